"""A classification head: where it reads, what a choice's single logit gives, what it learns and leaves alone."""

import pytest
import torch
import transformers
from torch import nn

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import HEAD
from ptuning.backbone.trained_weights import with_head
from ptuning.config import TrainConfig
from ptuning.data.questions import Questions
from ptuning.data.task_files import TaskFile
from ptuning.engine.forward import target_logits
from ptuning.engine.objective import class_scores, inputs_of, score_continuations
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import BackboneError
from ptuning.method.base import Setup, Task
from ptuning.method.classification_head import HeadModel, head_items, head_template
from ptuning.method.registry import methods
from ptuning.template.encode import Example, TokenizedTemplate
from tests.families import FAMILIES, built, tokenizer_of

LABELS = TaskFile.parse(
    'name = "mood"\nversion = "1"\n[labels]\ngood = ["good"]\nbad = ["bad"]\n[[patterns]]\nmanual = "So {text}: [Y]."'
)
CHOICES = TaskFile.parse(
    'name = "next"\nversion = "1"\n[choices]\nfrom = ["one", "other"]\n[[patterns]]\nmanual = "{text}, so [Y]."'
)
TEXTS = ("the movie", "a film", "Kenya and Peru", "the capital of France is")
# The library's own classes for these, and the name of what its classifier is called there.
OWN_CLASSES = {
    "gpt2": ("GPT2ForSequenceClassification", "score"),
    "llama": ("LlamaForSequenceClassification", "score"),
    "gemma-2": ("Gemma2ForSequenceClassification", "score"),
    "opt-350m": ("OPTForSequenceClassification", "score"),
    "xlnet": ("XLNetForSequenceClassification", "logits_proj"),
    "t5": ("T5ForSequenceClassification", "classification_head"),
    "umt5": ("UMT5ForSequenceClassification", "classification_head"),
    "bart": ("BartForSequenceClassification", "classification_head"),
    "mbart": ("MBartForSequenceClassification", "classification_head"),
}
QUICK = TrainConfig(epochs=20, batch_size=4, backbone_lr=5e-3, patience=20)


def task(file: TaskFile) -> Task:
    rows = [
        {"text": f"{text} {('yes', 'no')[at % 2]}", "one": "yes", "other": "no", "label": ("good", "bad")[at % 2]}
        for at, text in enumerate(TEXTS * 2)
    ]
    if file is CHOICES:
        rows = [{**row, "label": ("yes", "no")[at % 2]} for at, row in enumerate(rows)]
    data = file.read_rows(rows)
    return Task(file.name, data, data, file.manual[0], file.learned[0], (), file=file)


@torch.no_grad()
def under_head(backbone: Backbone, example: Example) -> torch.Tensor:
    """Return what a head makes of the last layer of transformers' own run, (K,)."""
    hidden = backbone.model.base_model(input_ids=torch.tensor([example.token_ids])).last_hidden_state[0]
    logits: torch.Tensor = getattr(backbone.model, HEAD)(hidden[example.logit_positions[0]])
    return logits


def bound(backbone: Backbone, mood: Task) -> TokenizedTemplate:
    return TokenizedTemplate(head_template(mood, kind=backbone.kind), tokenizer=backbone.tokenizer, kind=backbone.kind)


def test_it_reads_the_fields_and_a_choice_without_words_around(backbone: Backbone) -> None:
    for file, texts in ((LABELS, ["the movie yes"]), (CHOICES, ["the movie yes yes", "the movie yes no"])):
        mood = task(file)
        item = head_items(bound(backbone, mood), Questions(mood.train[:1]), mood.answer_space)[0]
        read = [
            backbone.tokenizer.decode(
                [token for token in row.token_ids if token not in backbone.tokenizer.special_ids.values()]
            )
            for row in item.inputs
        ]
        assert [text.strip() for text in read] == texts
        last = [len(row.token_ids) - 1 if backbone.kind == "causal" else 0 for row in item.inputs]
        assert [row.logit_positions for row in item.inputs] == [(at,) for at in last]
        assert (item.classes, item.answers) == ((0, 1), (0,))
        if backbone.kind == "masked":
            assert all(backbone.tokenizer.mask_id not in row.token_ids for row in item.inputs)


def test_logits_are_those_of_a_linear_layer_on_one_hidden_state(backbone: Backbone) -> None:
    """The same as transformers' own hidden states under the head, row by row, whatever is beside it."""
    other = with_head(backbone, 2, seed=0)
    mood = task(LABELS)
    items = head_items(bound(other, mood), mood.train, mood.answer_space)
    logits = target_logits(other, inputs_of(items), PromptBatch.none(other.width))  # (N, 2)
    assert logits.shape == (len(items), 2)
    for row, item in zip(logits, items, strict=True):
        (example,) = item.inputs
        expected = under_head(other, example)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_choices_are_scored_each_from_its_own_row(causal: Backbone) -> None:
    other = with_head(causal, 1, seed=0)
    mood = task(CHOICES)
    items = head_items(bound(other, mood), mood.train, mood.answer_space)
    scores = class_scores(
        items, score_continuations(items, target_logits(other, inputs_of(items), PromptBatch.none(other.width)))
    )
    for item, row in zip(items, scores, strict=True):
        own = [float(under_head(other, example)[1]) for example in item.inputs]
        assert float(row[0] - row[1]) == pytest.approx(own[0] - own[1], abs=1e-4)


@pytest.mark.parametrize("file", [LABELS, CHOICES], ids=["labels", "choices"])
def test_it_learns_and_leaves_the_backbone_alone(file: TaskFile, backbone: Backbone) -> None:
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    config = QUICK if backbone.kind == "causal" else QUICK.adapted(epochs=40, patience=40)
    solution = methods["fine-tuning"].fit(task(file), Setup(backbone, config=config))
    answers = solution.answer(task(file).train)
    assert sum(answer.hit for answer in answers) / len(answers) > 0.7
    assert {answer.text for answer in answers} <= ({"good", "bad"} if file is LABELS else {"yes", "no"})
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.model.state_dict().items())
    assert backbone.model.get_output_embeddings() is not None


def test_two_trainings_are_the_same_and_rows_without_labels_are_answered(causal: Backbone) -> None:
    mood = task(LABELS)
    setup = Setup(causal, config=QUICK.adapted(epochs=2))
    models = [HeadModel(mood, setup, QUICK.adapted(epochs=2, train_backbone="full")) for _ in range(2)]
    answers = [model.answer(mood.train) for model in models]
    assert answers[0] == answers[1]
    bare = LABELS.read_rows([{"text": row.record["text"]} for row in mood.train], labelled=False)
    assert [answer.text for answer in models[0].answer(bare)] == [answer.text for answer in answers[0]]
    assert not any(answer.hit for answer in models[0].answer(bare))


@pytest.mark.parametrize("family", OWN_CLASSES)
@torch.no_grad()
def test_it_reads_where_the_librarys_own_class_does(family: str) -> None:
    """Weights, classifier and text put into the library's class give the same logits."""
    other = with_head(built(family), 2, seed=0)
    name, classifier = OWN_CLASSES[family]
    theirs = getattr(transformers, name)(other.model.config).eval()
    ours = other.model.base_model.state_dict()
    body = theirs.base_model if theirs.base_model is not theirs else theirs.transformer
    missing = body.load_state_dict({key: ours[key] for key in body.state_dict()}, strict=False).missing_keys
    assert not missing
    setattr(theirs, classifier, getattr(other.model, HEAD))
    if family == "xlnet":  # its summary has a layer of its own between the hidden state and the classifier
        theirs.sequence_summary.summary, theirs.sequence_summary.activation = nn.Identity(), nn.Identity()

    mood = task(LABELS)
    items = head_items(bound(other, mood), mood.train, mood.answer_space)
    logits = target_logits(other, inputs_of(items), PromptBatch.none(other.width))  # (N, 2)

    tokenizer = tokenizer_of(FAMILIES[family].tokenizer)
    for row, item in zip(logits, items, strict=True):
        (example,) = item.inputs
        ids = list(example.token_ids[: example.encoder_tokens or None])
        assert ids == tokenizer(mood.train[items.index(item)].record["text"])["input_ids"]
        torch.testing.assert_close(row, theirs(input_ids=torch.tensor([ids])).logits[0], atol=1e-5, rtol=0)
    assert float(logits.std(dim=0).max()) > 1e-4, "all rows alike would show nothing"


def test_a_head_reads_the_layers_width_where_embeddings_are_narrower() -> None:
    """ALBERT's layers give 32 numbers, which its own head turns into the 16 of an embedding."""
    head = getattr(with_head(built("albert"), 3, seed=0).model, HEAD)
    assert (head.in_features, built("albert").width) == (32, 16)


def test_a_body_that_hides_its_states(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in causal.model.modules():
        module._forward_hooks.clear()
    with pytest.raises(BackboneError, match=r"does not return the hidden states .* leave fine-tuning out"):
        with_head(causal, 2, seed=0)
