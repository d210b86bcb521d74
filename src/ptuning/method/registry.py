"""The list of all methods: `METHODS`, which is `ptuning.methods`. A new method of the package is listed here."""

from ptuning.method.base import Methods
from ptuning.method.tuned import TUNED
from ptuning.method.untrained import UNTRAINED

METHODS = methods = Methods({method.name: method for method in (*UNTRAINED, *TUNED)})
