"""Ask a running server for the example of an export, and compare its log-probability with ours.

For servers with OpenAI's completions that take ids and echo log-probabilities, such as vLLM:

    vllm serve MODEL --enable-lora --max-lora-rank 8 --lora-modules my-prompt=FOLDER
    python scripts/check_export.py FOLDER --model my-prompt
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

SECONDS = 120.0


def asked(url: str, model: str, ids: list[int]) -> list[float | None]:
    """Return the log-probability that a server gives to each of some ids; None for the first."""
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        found: list[float | None] = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
    return found


def check(folder: Path, url: str, model: str) -> dict[str, Any]:
    """Return both log-probabilities of the example's target, and their difference."""
    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    example = about["example"]
    given, target = example["input_ids"], example["target_ids"]
    found = asked(url, model, [*given, *target])[len(given) : len(given) + len(target)]
    theirs = sum(value for value in found if value is not None)
    return {
        "kind": about["kind"],
        "record": example["record"],
        "log_prob": example["log_prob"],
        "server": theirs,
        "difference": abs(theirs - example["log_prob"]),
    }


def main() -> int:
    """Print the comparison; exit code 1 if the difference is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what ptuning export wrote (--as lora or tokens)")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="the name under which the server has it")
    parser.add_argument("--at-most", type=float, default=1e-3, help="the largest difference that is rounding")
    given = parser.parse_args()
    found = check(given.folder, given.url.rstrip("/"), given.model)
    print(json.dumps(found, ensure_ascii=False, indent=2))
    return int(not found["difference"] <= given.at_most)


if __name__ == "__main__":
    sys.exit(main())
