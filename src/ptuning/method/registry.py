"""The list of all methods: `METHODS`, which is `ptuning.methods`. A new method of the package gets its line here."""

from __future__ import annotations

from ptuning.method.base import Methods
from ptuning.method.in_context import IN_CONTEXT
from ptuning.method.majority import MAJORITY
from ptuning.method.manual import MANUAL_PROMPT, MANUAL_RESTRICTED
from ptuning.method.tuned import TUNED

# In the order of tables.
METHODS = Methods({one.name: one for one in (MAJORITY, MANUAL_PROMPT, MANUAL_RESTRICTED, IN_CONTEXT, *TUNED)})
# Its public name.
methods = METHODS
