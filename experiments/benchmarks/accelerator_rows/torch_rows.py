"""Measures SFT, DPO and generation with torch and transformers, and how much faster this library is.

These measurements need a process in which JAX does not use the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from benchmarks.accelerator_rows import row_context, training_rows


def peer(context: row_context.Context) -> None:
    """Measures an SFT step, a DPO step and generation with transformers and scaled dot-product attention."""
    try:
        import torch
        import transformers
    except ImportError as error:
        context.record("transformers + torch", note=f"not installed: {error.name}")
        return
    platform = {each["platform"] for each in context.earlier if each.get("measure") == "device"}
    device = {"gpu": "cuda", "cpu": "cpu"}.get(platform.pop() if platform else "gpu")
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        context.record("transformers + torch", note=f"this torch ({torch.__version__}) cannot use the device")
        return
    cfg, shapes = training_rows.model(context.shapes), context.shapes
    config = transformers.GPTNeoXConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        intermediate_size=cfg.d_mlp,
        max_position_embeddings=cfg.max_length,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.GPTNeoXForCausalLM(config)
    context.record("torch", note=f"torch {torch.__version__}, transformers {transformers.__version__}, {device}")
    _train(context, torch, model, device)
    model = model.bfloat16().eval()
    _generate(context, torch, model, device, shapes)


def _train(context: row_context.Context, torch: Any, model: Any, device: str) -> None:
    """Measures train steps with float32 parameters and bfloat16 products, as in the rows they are compared with."""
    shapes = context.shapes
    vocab = model.config.vocab_size
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-5, fused=device == "cuda")
    reference = copy.deepcopy(model).requires_grad_(False)

    def tokens(*shape: int) -> Any:
        return torch.randint(3, vocab, shape, device=device)

    def logprobs(network: Any, tokens_BL: Any, start: int) -> Any:
        kept = tokens_BL.shape[1] - start + 1  # only the logits that predict the tokens from `start` on
        logits = network(tokens_BL, logits_to_keep=kept).logits[:, :-1].float()
        return -torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens_BL[:, start:].flatten(), reduction="none"
        ).view(len(tokens_BL), -1)

    def sft_loss(network: Any) -> Any:
        return -logprobs(network, tokens(shapes.sft_rows, shapes.sft_length), 1).mean()

    def dpo_loss(network: Any) -> Any:
        length = 2 * shapes.pair_length
        tokens_BL = tokens(shapes.pairs // 2 * 2, length)
        policy_B = logprobs(network, tokens_BL, length // 2).sum(1)
        with torch.no_grad():
            reference_B = logprobs(reference, tokens_BL, length // 2).sum(1)
        chosen, rejected = (policy_B - reference_B).view(2, -1)
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    def step(loss: Callable[[Any], Any], network: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(device, torch.bfloat16):
                value = loss(network)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            _synchronize(torch)

        return run

    sft_tokens = shapes.sft_rows * shapes.sft_length
    dpo_tokens = 2 * (shapes.pairs // 2) * 2 * shapes.pair_length
    networks = {"": model} | ({", compiled": torch.compile(model)} if device == "cuda" else {})
    for name, network in networks.items():
        _measure(context, f"torch SFT step{name}", step(sft_loss, network), sft_tokens, "sft", "SFT step", 1.0)
    _measure(context, "torch DPO step", step(dpo_loss, model), dpo_tokens, "dpo", "DPO step", None)


def _generate(context: row_context.Context, torch: Any, model: Any, device: str, shapes: row_context.Shapes) -> None:
    for batch in shapes.batches[1:3]:
        prompts = torch.randint(3, model.config.vocab_size, (batch, shapes.prompt), device=device)
        options: dict[str, Any] = {"do_sample": True, "top_k": 0, "use_cache": True, "pad_token_id": 0}
        options |= {"max_new_tokens": shapes.answer, "min_new_tokens": shapes.answer}

        def run(prompts: Any = prompts, options: dict[str, Any] = options) -> None:
            with torch.no_grad():
                model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
            _synchronize(torch)

        name = f"generation, batch {batch}"
        _measure(context, f"torch {name}", run, batch * shapes.answer, "decode", name, 1.5)


def _measure(
    context: row_context.Context,
    measure: str,
    run: Callable[[], None],
    tokens: int,
    row: str,
    ours: str,
    at_least: float | None,
) -> None:
    """Records torch's rate and the ratio of this library's rate to it, or a note if torch fails."""
    try:
        seconds, times = row_context.seconds(run, repeats=min(context.shapes.repeats, 3))
    except Exception as error:
        context.record(measure, note=f"failed: {row_context.first_line(error)}")
        return
    context.record(measure, tokens / seconds, "tokens/s", **times)
    own = context.value(row, ours)
    if own is None:
        context.record(f"ours / {measure}", note=f"the row {row} was not measured in this run")
        return
    aim = {} if at_least is None else {"at_least": at_least}
    context.record(f"ours / {measure}", own * seconds / tokens, "x", **aim)


def _synchronize(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
