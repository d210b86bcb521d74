"""Fine-tuning with a classification head: a linear layer on one hidden state, instead of label words (a verbalizer).

The head replaces the language model's own head, so batches, logits and losses over classes are the same as for
prompts. It reads the position that transformers' classification models read.
"""

from collections.abc import Mapping

from ptuning.backbone.trained_weights import with_head
from ptuning.config import TrainConfig, derived_seed
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import Question, Questions
from ptuning.engine.objective import Continuation, ScoringRequest
from ptuning.engine.prefix_store import PreparedPrompt
from ptuning.engine.runner import Runner, Scoring
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.files import Json
from ptuning.method.base import Setup, Task
from ptuning.metrics import Answer
from ptuning.prompt.rows import candidates_of
from ptuning.prompt.score import among_candidates
from ptuning.records import Record
from ptuning.template.ambiguity import is_known
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.template.language import Field, Literal, Target, Template, Turn
from ptuning.template.segments import Kind
from ptuning.training.optimizer import with_gradients
from ptuning.training.trainer import Trainer

# Name of the field that holds a row's choice; task files cannot use this name.
CHOICE = "a row's choice"


def head_template(task: Task, *, kind: Kind) -> Template:
    """Return the template of a task's fields and a row's choice, without words; all on an encoder's side, if any."""
    kept = {piece.name for piece in task.manual.pieces if isinstance(piece, Field) and piece.keep}
    names = [*task.manual.fields, *([CHOICE] if task.answer_space.has_choices else [])]
    pieces = [piece for name in names for piece in (Field(name, name in kept or name == CHOICE), Literal(" "))]
    return Template((*pieces, *([Turn()] if kind == "encoder-decoder" else []), Target()))


def head_items(bound: TokenizedTemplate, questions: Questions, answers: AnswerSpace) -> list[ScoringRequest]:
    """Return one request per question: one input whose classes are the labels, or one input per choice."""
    rows = [filled for question in questions for filled in _filled(question, answers)]
    filled = bound.contexts(rows, source=questions.name)
    examples = iter([_at_summary(row, kind=bound.kind, stop_id=bound.tokenizer.stop_id) for row in filled])
    items = []
    unknown_id = bound.tokenizer.unknown_id
    for question in questions:
        inputs = tuple(next(examples) for _ in _filled(question, answers))
        if answers.has_choices:
            known = [is_known(tuple(ids), unknown_id) for ids in bound.tokenizer.encode(question.choices)]
            choices = tuple(Continuation(place, (1,), 1, is_distinct) for place, is_distinct in enumerate(known))
        else:
            choices = tuple(Continuation(0, (label,), 1) for label in range(len(answers.labels)))
        items.append(ScoringRequest(inputs, choices, tuple(range(len(choices))), answers.right(question)))
    return items


def _filled(question: Question, answers: AnswerSpace) -> list[Record]:
    if not answers.has_choices:
        return [question.record]
    return [{**question.record, CHOICE: text} for text in question.choices]


def _at_summary(example: Example, *, kind: Kind, stop_id: int | None) -> Example:
    """Move the scored position to the token that summarises the text: the first one for a masked model, the last one
    for the others. A decoder reads the text again after its start token, up to the end of the text.

    Source: Devlin et al. (2019), section 4.1; Radford et al. (2018), section 3.2; Lewis et al. (2020), section 3.1;
        ``XLNetForSequenceClassification`` and ``T5ForSequenceClassification`` of transformers.
    """
    ids, decoder = example.token_ids, example.encoder_tokens
    if decoder:
        text, start = ids[:decoder], ids[decoder]
        end = max((at for at, token in enumerate(text) if token == stop_id), default=decoder - 1)
        ids, at = (*text, start, *text[:-1]), decoder + end
    elif kind == "causal":
        at = len(ids) - 1
    else:
        mask = example.logit_positions[0]
        ids = (*ids[:mask], *ids[mask + 1 :])  # nothing is filled in, so the mask goes
        at = 0 if kind == "masked" else len(ids) - 1
    return Example(ids, (), (at,), (), 0, shortened=example.shortened, encoder_tokens=decoder)


class HeadModel:
    """A copy of a backbone with a classification head, trained on a task that has labels or choices."""

    @with_gradients
    def __init__(self, task: Task, setup: Setup, config: TrainConfig) -> None:
        self.answer_space = answers = task.answer_space
        seed = derived_seed(config.seed, "classification head")
        copy = with_head(setup.backbone, len(answers.labels) or 1, seed=seed)
        self.bound = TokenizedTemplate(
            head_template(task, kind=copy.kind),
            tokenizer=copy.tokenizer,
            kind=copy.kind,
            max_length=config.max_length,
        )
        parts = (answers.to_learn(task.train, seed=config.seed), task.dev)
        train, dev = (head_items(self.bound, part, answers) for part in parts)
        trainer = Trainer(copy, self.bound, config=config)
        trainer.fit(train, dev, report=setup.report, should_stop=setup.should_stop)
        self.backbone = trainer.learner.backbone
        self.score, self.loss = trainer.state.best_score, trainer.state.best_loss
        self.record: Mapping[str, Json] = {
            "start": dict(trainer.state.start),
            "history": [dict(epoch) for epoch in trainer.state.history],
            "chosen_epoch": trainer.state.chosen_epoch,
            "trainable_parameters": trainer.learner.trainable_parameters,
        }

    def answer(self, questions: Questions) -> list[Answer]:
        """Return the most probable label or choice for each question."""
        prompt = PreparedPrompt(PromptBatch.none(self.backbone.width), self.bound)
        works = [
            Scoring.of(item, prompt, self.answer_space.names(question))
            for item, question in zip(head_items(self.bound, questions, self.answer_space), questions, strict=True)
        ]
        Runner(self.backbone).complete(works)
        return [among_candidates(row.right, candidates_of(work)) for row, work in zip(questions, works, strict=True)]
