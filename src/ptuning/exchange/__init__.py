"""Export of prompts to PEFT, vLLM and llama.cpp, verified by reading them back, and import from PEFT.

Knows peft and transformers; must not know how prompts are trained, nor print. Read first: ``export``, then ``verify``,
``format``; the formats: ``peft``, ``model_copy``, ``embeds``; ``import_peft`` is the way back.
"""

# Export formats, and a line about each; here, so that the command's help imports nothing else.
FORMATS = {
    "lora": "a LoRA of PEFT on the input embeddings; vLLM, PEFT",
    "peft": "prompt tuning of PEFT, or prefix tuning if the slots are deep ones; for slots before the first field",
    "tokens": "a copy of the model with a token for each slot; any engine",
    "gguf": "a copy of the GGUF file with the slots as tokens; llama.cpp",
    "embeds": "slot vectors and positions; for vLLM's prompt_embeds",
}
