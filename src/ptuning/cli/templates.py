"""Templates on the command line: which one is asked for, from files or options, and where its slots pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ptuning.cli import terminal
from ptuning.errors import ConfigError, TemplateError
from ptuning.files import read_text

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone
    from ptuning.data.questions import Questions
    from ptuning.data.task_files import TaskFile
    from ptuning.template.language import Template
    from ptuning.template.segments import Tokenizer
    from ptuning.training.spec import TrainSpec

Spec = TypeVar("Spec", bound="TrainSpec")

# Heavy modules (torch, transformers) are imported inside the functions: --help must not wait for them.


def read_template(path: Path) -> str:
    """Return the template in a file: its text as it is, without line breaks at its end."""
    from ptuning.template.language import Template

    text = read_text(path, error=TemplateError).replace("\r\n", "\n").rstrip("\n")
    try:
        Template.parse(text)
    except TemplateError as error:
        raise TemplateError(f"{path}: {error}") from error
    return text


def template_and_manual(
    template: str | None, manual: str | None, path: Path | None, *, learns_words: bool = True, both: bool = False
) -> tuple[str | None, str | None]:
    """Return --template and --manual, which may be in a file: as the latter if it has no slots, unless it can be
    learned with as it is. A ConfigError if there are several, or several of one where ``both`` may be given.
    """
    if path is None:
        return template, manual
    if not both and (template is not None or manual is not None):
        raise ConfigError("--template-file brings the template; leave --template and --manual out")
    from ptuning.template.language import Template

    text = read_template(path)
    if learns_words and not Template.parse(text).has_slots:
        if manual is not None:
            raise ConfigError(f"{path} (--template-file) has no slots: it is a manual template, and so is --manual")
        return template, text
    if template is not None:
        raise ConfigError(f"{path} (--template-file) has slots: it is the template to learn, and so is --template")
    return text, manual


def notice_line_breaks(pattern: str | None, tokenizer: Tokenizer, *, say: Callable[[str], None] = terminal.say) -> None:
    """Warn about a template with a backslash and an n, as a shell passes them on, where a line break may be meant."""
    if pattern is None or "\\n" not in pattern or tokenizer.line_end_id is None:
        return
    say(
        "warning: the template has a backslash and an n, and not a line break, which this tokenizer knows; if you mean "
        f"line breaks, write in bash or zsh\n  {as_shell_text(pattern)}\nor put the template into a file, with line "
        "breaks as they are (--template-file FILE)"
    )


def as_shell_text(pattern: str) -> str:
    r"""Return a template as bash and zsh read it with its line breaks, where a backslash and an n stand for one.

    >>> print(as_shell_text(r"It's\n[Y]"))
    $'It\'s\n[Y]'
    """
    escaped = pattern.replace("\\", "\\\\").replace("\\\\n", "\\n").replace("\n", "\\n").replace("'", "\\'")
    return f"$'{escaped}'"


def placed(
    spec: Spec, given: Mapping[str, Any], backbone: Backbone, *, say: Callable[[str], None] = terminal.say
) -> Spec:
    """Return a training whose template, if it is made from a manual one (``given``), has its slots where they pay, or
    if it is a chat's is made from the model's own. Say where slots are, and what may be wrong with line breaks.
    """
    from ptuning.data.questions import as_questions
    from ptuning.training.prepare import place_slots

    if given.get("chat"):
        made = chat_template_of(backbone.tokenizer, as_questions(spec.data), given.get("system"))
        return replace(spec, template=made)
    manual, task = given.get("manual"), spec.task
    notice_line_breaks(manual or given.get("template"), backbone.tokenizer, say=say)
    if manual is None or given.get("method") is not None:
        return spec
    questions = as_questions(spec.data)
    found = place_slots(
        manual,
        questions.records,
        backbone,
        config=spec.settings,
        closed=spec.labels is not None or questions.has_choices or (task is not None and task.answer_space.is_closed),
        about=given.get("about"),
    )
    if found.told:
        say(found.told)
    return replace(spec, template=found.template)


def chat_template_of(tokenizer: Tokenizer, questions: Questions | None, system: str | None) -> Template:
    """Return the template of a chat: its slots start at the given system text, else at that of the conversations, else
    at the chat template's own.
    """
    from ptuning.data.conversations import system_text
    from ptuning.template.chat import chat_template

    if system is None and questions is not None:
        system = system_text(questions)
    return chat_template(tokenizer, system)


def pattern_of(templates: Sequence[Template], task: TaskFile, number: int) -> Template:
    """Return a task's template by its number, from 1."""
    if not 1 <= number <= len(templates):
        raise ConfigError(f"the task {task.name} has the patterns 1 to {len(templates)}, not {number}")
    return templates[number - 1]


def template_pair(
    task: TaskFile | None, manual: str | None, template: str | None, pattern: int | None
) -> tuple[Template, Template | None]:
    """Return the manual template of a comparison and the one to learn, if it is given: as asked for, or a task's."""
    from ptuning.template.language import Template

    if pattern is not None and (task is None or manual is not None):
        raise ConfigError("--pattern is the number of a task's template; it goes with --task, and without --manual")
    given = Template.parse(template) if template is not None else None
    if manual is not None:
        return Template.parse(manual), given
    if task is None:
        raise ConfigError("give the manual template (--manual), or --task")
    number = 1 if pattern is None else pattern
    return pattern_of(task.manual, task, number), given or pattern_of(task.learned, task, number)


def template_of(
    task: TaskFile | None,
    template: str | None,
    manual: str | None,
    about: str | None,
    pattern: int | None,
    *,
    option: str = "--",
) -> Template:
    """Return the template to learn: as given, from a manual one, or a task's; a ConfigError if these clash."""
    from ptuning.template.language import Template

    if (template is not None) + (manual is not None) != 1 and (task is None or template is not None):
        raise ConfigError(
            f"give either {option}template, or {option}manual to have one made from a manual template, or {option}task"
        )
    if about is not None and manual is None:
        raise ConfigError(f"{option}about goes with {option}manual")
    if pattern is not None and (task is None or template is not None or manual is not None):
        raise ConfigError(f"{option}pattern is the number of a task's template; it goes with {option}task alone")
    if template is not None:
        return Template.parse(template)
    if manual is not None:
        return Template.from_manual(manual, about=about)
    assert task is not None
    return pattern_of(task.learned, task, 1 if pattern is None else pattern)
