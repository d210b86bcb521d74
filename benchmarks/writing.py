"""How fast are answers of 32 tokens written, against transformers' generate behind the same embeddings?"""

from __future__ import annotations

import time

import torch

from benchmarks.common import Settings, answer, interleave, no_answer, parser, ratios, settings_of, spread, write_result
from benchmarks.material import backbone_of, bind, every, seconds_of
from ptuning.backbone.backbone import quiet
from ptuning.config import GenerationSettings
from ptuning.engine import runner
from ptuning.engine.batch import collate
from ptuning.engine.forward import embed_inputs
from ptuning.engine.prefix_store import PreparedPrompt
from ptuning.prompt.prompt import Prompt

TEMPLATE = "[P*6] The capital of [X] is [Y]"
ROWS = 16
TOKENS = 32
METHOD = (
    f"Greedy writing of {TOKENS} tokens behind {ROWS} records of {TEMPLATE}, one batch with pads on the left. Both "
    "make the embeddings themselves, and neither stops before the last token. Times count if texts are equal."
)


def main(settings: Settings) -> None:
    """Measure both in turn."""
    began = time.monotonic()
    backbone = backbone_of(settings)
    bound = bind(backbone, TEMPLATE)
    bound.multiline, backbone.tokenizer.end_ids = True, frozenset()
    prompt = Prompt.from_token_ids(TEMPLATE, backbone.tokenizer.encode(["a"])[0][:1] * bound.slots, backbone)
    learned, tokens = prompt.learned(backbone), settings.pick(TOKENS, 4)
    records = every("capitals")[: settings.pick(ROWS, 3)]
    how = GenerationSettings()
    texts: dict[str, list[str]] = {}

    def ours() -> None:
        found = runner.generate(backbone, PreparedPrompt(learned, bound), records, max_tokens=tokens, settings=how)
        texts["ptuning"] = [row[0].text for row in found]

    def generate() -> None:
        batch = collate(bound.contexts(records, target_tokens=tokens), learned, pad_side="left").to(backbone.device)
        with quiet():
            rows = backbone.model.generate(  # type: ignore[operator]
                inputs_embeds=embed_inputs(backbone.embed(batch.token_ids), learned.vectors, batch),
                attention_mask=batch.mask,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        texts["generate"] = [backbone.tokenizer.decode(row).strip() for row in rows.tolist()]

    with torch.no_grad():
        ours()  # what a process does once, before the clock runs
        generate()
        found = interleave(
            {
                "ptuning": lambda _: seconds_of(ours, backbone.device),
                "generate": lambda _: seconds_of(generate, backbone.device),
            },
            repeats=settings.pick(7, 2),
            seconds=150,
            seed=settings.seed,
            note="writing",
        )
    same = sum(one == other for one, other in zip(texts["ptuning"], texts["generate"], strict=True))
    note = f"{len(records)} rows, {tokens} tokens, {same} texts are the same"
    values = ratios(found["generate"], found["ptuning"])
    write_result(
        settings,
        "writing",
        question=(__doc__ or "").splitlines()[0],
        cells=[
            {"cell": "greedy writing", "contestant": who, "rows": len(records), "seconds": spread(seconds)}
            for who, seconds in found.items()
        ],
        answers={"writing-32": answer(values, note) if same == len(records) else no_answer(f"texts differ: {note}")},
        method=METHOD,
        seconds=time.monotonic() - began,
    )


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
