"""``POST /tokenize``, ``/detokenize`` and ``GET /tokenizer_info``: the model's tokenizer, as lm-eval asks for it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from ptuning.serve.http.errors import JsonResponse, refused
from ptuning.serve.http.replies import called
from ptuning.serve.http.schemas import DetokenizeRequest, TokenizeRequest
from ptuning.serve.http.service import Service

router = APIRouter()


@router.post("/tokenize")
async def tokenize(asked: TokenizeRequest, request: Request) -> Response:
    """Return the token ids of a text, as the tokenizer itself gives them. All prompts share it."""
    service = _checked(asked.model, request)
    tokenizer = service.engine.model.backbone.tokenizer

    def work() -> tuple[list[int], list[str] | None]:
        ids = tokenizer.read(asked.prompt, add_special_tokens=asked.add_special_tokens)
        return ids, [tokenizer.token(one) for one in ids] if asked.return_token_strs else None

    ids, texts = await called(request, work)
    return JsonResponse({"count": len(ids), "max_model_len": service.context, "tokens": ids, "token_strs": texts})


@router.post("/detokenize")
async def detokenize(asked: DetokenizeRequest, request: Request) -> Response:
    """Return the text of token ids."""
    service = _checked(asked.model, request)
    backbone = service.engine.model.backbone
    outside = [one for one in asked.tokens if one >= backbone.vocabulary]
    if outside:
        raise refused("tokens", f"token id {outside[0]} is outside the vocabulary of {backbone.vocabulary}")
    return JsonResponse({"prompt": await called(request, lambda: backbone.tokenizer.decode(asked.tokens))})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """Tell the tokenizer's class and special tokens."""
    backbone = Service.of(request).engine.model.backbone
    found = await called(request, backbone.tokenizer.described)
    return JsonResponse({**found, "model_max_length": backbone.tokenizer.max_tokens})


def _checked(name: str | None, request: Request) -> Service:
    service = Service.of(request)
    if name is not None:
        service.find(request, name)
    return service
