"""``arithmetic``: sums, differences and products with their steps; divided by operation and operands, so that no
question is in two parts. A pair of numbers may be, once added and once multiplied.

Source: the shapes of Liu and Low (2023), Goat, arXiv:2305.14201, section 3: ``input``, ``output`` with the steps and
``answer``; products of several digits are expanded. ``digits`` says how many the operands have.
"""

from __future__ import annotations

from collections.abc import Iterator

from experiments.rules.draws import number, part_of, shuffled

# Operator and the digits of its operands; each is a cell of a table by digits.
CELLS = tuple(
    (sign, left, right)
    for sign, pairs in {
        "+": ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)),
        "-": ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)),
        "*": ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2)),
    }.items()
    for left, right in pairs
)
# Maximum number of rows of a cell; of one digit by another there are fewer.
MOST = {"train": 250, "dev": 20, "test": 200}
# So many pairs are tried for a cell that has more than it may hold.
TRIED = 1500


def rows(split: str) -> list[dict[str, str]]:
    """Return the rows of a part, in a drawn order."""
    pairs = [(cell, pair) for cell in CELLS for pair in _pairs(*cell, split=split)]
    return [_row(sign, *pair, digits=f"{left}{sign}{right}") for (sign, left, right), pair in shuffled(pairs, "order")]


def _pairs(sign: str, left: int, right: int, *, split: str) -> list[tuple[int, int]]:
    """Return operands that belong to a part: pairs of the same two numbers are in the same one."""
    part = _part_of_few if left == right == 1 else part_of
    pairs = [
        pair
        for pair in dict.fromkeys(_tried(sign, left, right))
        if part(sign, *sorted(pair)) == split and not (sign == "-" and pair[0] < pair[1])
    ]
    return shuffled(pairs, "pairs", sign, left, right)[: MOST[split]]


def _part_of_few(*key: object) -> str:
    """Return the part of a pair of one-digit numbers, which are so few that half of them are test rows."""
    part = part_of(*key)
    return "test" if part == "train" and number("few", *key) % 5 < 2 else part


def _tried(sign: str, left: int, right: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of numbers with a number of digits, all of them if there are few."""
    (first, size), (other, width) = ((10 ** (digits - 1), 9 * 10 ** (digits - 1)) for digits in (left, right))
    if size * width <= TRIED:
        yield from ((first + a, other + b) for a in range(size) for b in range(width))
        return
    for turn in range(TRIED):
        drawn = number("operands", sign, left, right, turn)
        yield first + drawn % size, other + drawn // size % width


def _row(sign: str, left: int, right: int, *, digits: str) -> dict[str, str]:
    answer = left + right if sign == "+" else left - right if sign == "-" else left * right
    expression = f"{left} {sign} {right}"
    return {
        "input": expression,
        "output": " = ".join([expression, *_steps(sign, left, right), str(answer)]),
        "answer": str(answer),
        "digits": digits,
    }


def _steps(sign: str, left: int, right: int) -> list[str]:
    """Return the expansion of a product with a number of two digits: by tens and ones, multiplied, then added."""
    if sign != "*" or right < 10:
        return []
    parts = [part for part in (right // 10 * 10, right % 10) if part]
    if len(parts) == 1:
        return []
    return [
        f"{left} * ({' + '.join(map(str, parts))})",
        " + ".join(f"{left} * {part}" for part in parts),
        " + ".join(str(left * part) for part in parts),
    ]
