"""Prompts of one fleet that differ in everything. Other processes import them, too: nothing heavy stands here."""

from ptuning.config import TrainConfig
from ptuning.records import Record
from ptuning.training.spec import FleetPrompt

FACTS: list[Record] = [{"x": f"city {index}", "y": ("yes", "no", "São Tomé")[index % 3]} for index in range(11)]
TEXTS: list[Record] = [
    {"x": "All in all, the movie was great and long " * (1 + index % 3), "y": ("good", "bad")[index % 2]}
    for index in range(9)
]
FAST = TrainConfig(epochs=2, batch_size=3, lr=0.01, patience=99).as_defaults()
LABELLED: list[Record] = [{**row, "y": "ab"[index % 2]} for index, row in enumerate(FACTS)]
EVERY: tuple[FleetPrompt, ...] = (
    FleetPrompt("plain", "[P*2] [X] [P:is] [Y]", FACTS, config=FAST),
    FleetPrompt("late", "{x} [P:It was] [Y]", TEXTS, config=FAST.adapted(seed=1)),
    FleetPrompt("labels", "[P*2] [X] [P] [Y]", LABELLED, config=FAST.adapted(batch_size=4), labels="a=good;b=bad"),
    FleetPrompt("free", "[X] [P*3] [Y]", FACTS, config=FAST.adapted(encoder="none", epochs=1)),
    FleetPrompt("parts", "[P] [X] [P] [Y]", FACTS, config=FAST.adapted(batch_size=2, accumulation_steps=2)),
    FleetPrompt(
        "starts", "[P*2] [X] [Y]", FACTS[:7], config=FAST.adapted(num_restarts=2, encoder="mlp", cache_memory=0.0)
    ),
    FleetPrompt("dev", "[P:The] [X] [P:is] [Y]", FACTS[:8], dev=FACTS[8:], config=FAST.adapted(epochs=3, dropout=0.2)),
)
