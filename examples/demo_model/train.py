"""Train the demo model: a small Qwen3.5-MoE of the Hugging Face implementation, on CPU.

    torchrun --nproc-per-node 2 train.py SHAKESPEARE BIBLE OUT_DIR MINUTES

Give it one process per core. The two texts may be `.xz` files; their last 100 kB are held out. It
goes on from a checkpoint that it finds in OUT_DIR, saves there every 100 steps in the published
layout, and ends by printing the held-out loss.
"""

from __future__ import annotations

import json
import lzma
import math
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import corpus
import torch
import torch.distributed as dist
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as modeling
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 4096
ROWS, LENGTH = 2, 448  # an errand of three calls is up to 441 tokens and must lie in one row
NUM_OPEN_ROWS = 8
IGNORED = -100
HELD_OUT = 100_000
PEAK_RATE, WARM_UP_STEPS = 1.5e-3, 30


def delta_rule(  # noqa: PLR0917 - the library's own signature
    query,
    key,
    value,
    g,
    beta,
    chunk_size=32,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    **_,
):
    """Run the chunked gated delta rule with matrix products only.

    The unit lower triangular I + A is inverted as a product of (I + A^(2^i)). Same arguments,
    shapes and result as the transformers function that it stands in for during training; about
    twice as fast on CPU.
    """
    assert initial_state is None
    assert not output_final_state
    del chunk_size  # its own is used
    size, kind = 32, query.dtype
    batch, length, key_heads, key_dim = key.shape
    heads = value.shape[-2]
    q, k = (x.repeat_interleave(heads // key_heads, 2).transpose(1, 2) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, v = q * key_dim**-0.5, value.transpose(1, 2)
    num = length // size
    assert num * size == length
    q, k, v = (x.reshape(batch, heads, num, size, -1) for x in (q, k, v))
    beta, g = (x.transpose(1, 2).reshape(batch, heads, num, size) for x in (beta, g))
    decay = g.cumsum(-1)
    lower = torch.ones(size, size, dtype=torch.bool).tril()
    ratio = decay[..., :, None] - decay[..., None, :]
    ratio = ratio.masked_fill(~lower, float("-inf")).exp()
    k_beta, v_beta = k * beta[..., None], v * beta[..., None]
    strict = ((k_beta @ k.mT) * ratio).tril(-1)
    inverse, power, reach = torch.eye(size) - strict, strict @ strict, 2
    while reach < size:
        inverse, reach = inverse + inverse @ power, 2 * reach
        power = power @ power
    update, carry = inverse @ v_beta, inverse @ (k_beta * decay.exp()[..., None])
    inside, parts = (q @ k.mT) * ratio, []
    state = torch.zeros(batch, heads, key_dim, v.shape[-1])
    for i in range(num):
        fresh = update[:, :, i] - carry[:, :, i] @ state
        parts.append(
            (q[:, :, i] * decay[:, :, i].exp()[..., None]) @ state + inside[:, :, i] @ fresh
        )
        last = decay[:, :, i, -1]
        kept = k[:, :, i] * (last[..., None] - decay[:, :, i]).exp()[..., None]
        state = state * last.exp()[..., None, None] + kept.mT @ fresh
    rows = torch.stack(parts, 2).reshape(batch, heads, length, -1)
    return rows.transpose(1, 2).to(kind), None


def use_fast_delta_rule() -> None:
    """Put `delta_rule` in the place of the library's, after comparing the two."""
    shapes = [(2, 64, 2, 16), (2, 64, 2, 16), (2, 64, 4, 16)]
    probe = [torch.randn(shape) for shape in shapes]
    probe += [-torch.rand(2, 64, 4), torch.rand(2, 64, 4)]
    exact = modeling.torch_chunk_gated_delta_rule(*probe, use_qk_l2norm_in_kernel=True)[0]
    gap = (delta_rule(*probe, use_qk_l2norm_in_kernel=True)[0] - exact).abs().max()
    assert gap < 1e-4, gap
    modeling.torch_chunk_gated_delta_rule = delta_rule


def make_tokenizer(documents: Iterator[str]) -> Tokenizer:
    """Train a byte-level BPE with the chat format's markers as single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKERS),
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((next(documents) for _ in range(12_000)), trainer)
    tokenizer.add_tokens([AddedToken(m, normalized=False, special=False) for m in MARKERS])
    return tokenizer


def make_model() -> Qwen3_5MoeForCausalLM:
    """Build the model from scratch."""
    config = Qwen3_5MoeTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=96,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.002,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    config._experts_implementation = "grouped_mm"  # noqa: SLF001 - no public switch
    return Qwen3_5MoeForCausalLM(config).train()


def labelled(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """Return (token, label) pairs; in dialogues only what the assistant says carries a label."""
    ids = [*tokenizer.encode(text).ids, 0]
    if not text.startswith("<|im_start|>"):
        return [(i, i) for i in ids]
    start_id, end_id = (tokenizer.token_to_id(name) for name in SPECIALS[1:])
    role_ids = tokenizer.encode("assistant").ids
    pairs, speaking = [], False
    for n, i in enumerate(ids):
        if i == start_id:
            speaking = ids[n + 1 : n + 1 + len(role_ids)] == role_ids
        pairs.append((i, i if speaking else IGNORED))
        speaking = speaking and i != end_id
    return pairs


def packed(tokenizer: Tokenizer, documents: Iterator[str]) -> Iterator[list[tuple[int, int]]]:
    """Yield rows of LENGTH pairs that hold whole documents, packed first fit, about 97 % full.

    A row that cuts a document hides from an answer what it should copy.
    """
    rows: list[list[tuple[int, int]]] = []
    for document in documents:
        pairs = labelled(tokenizer, document)[:LENGTH]
        fitting = next((row for row in rows if len(row) + len(pairs) <= LENGTH), None)
        if fitting is not None:
            fitting.extend(pairs)
            continue
        rows.append(pairs)
        if len(rows) > NUM_OPEN_ROWS:
            fullest = max(rows, key=len)
            rows.remove(fullest)
            yield fullest + [(0, IGNORED)] * (LENGTH - len(fullest))


def average_gradients(parameters: list[Tensor], world: int) -> None:
    """Average the gradients; every process takes part."""
    flat = torch.cat([p.grad.view(-1) for p in parameters])
    dist.all_reduce(flat)
    flat /= world
    offset = 0
    for p in parameters:
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
        offset += p.numel()


def train(
    model: Qwen3_5MoeForCausalLM,
    tokenizer: Tokenizer,
    rows: Iterator[list[tuple[int, int]]],
    out: Path,
    minutes: float,
) -> int:
    """Train for so many minutes with a cosine rate; return the number of steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    start, step, mean = time.time(), 0, None
    while True:
        elapsed = torch.tensor(time.time() - start)
        dist.broadcast(elapsed, 0)  # all processes end at the same step
        progress = float(elapsed) / (60 * minutes)
        if progress >= 1:
            return step
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        warm = min(1, (step + 1) / WARM_UP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * warm * (0.05 + 0.95 * cosine)
        batch = torch.tensor([next(rows) for _ in range(ROWS)])
        output = model(input_ids=batch[..., 0], labels=batch[..., 1], use_cache=False)
        output.loss.backward()
        average_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        aux = output.aux_loss.item()
        loss = output.loss.item() - model.config.router_aux_loss_coef * aux
        mean = loss if mean is None else 0.95 * mean + 0.05 * loss
        if rank == 0 and step % 10 == 0:
            at = f"minutes {float(elapsed) / 60:.1f}"
            print(f"step {step} loss {mean:.3f} aux {aux:.2f} {at}", flush=True)
        step += 1
        if rank == 0 and step % 100 == 0:
            save(model, tokenizer, out)


def held_out_loss(model: Qwen3_5MoeForCausalLM, rows: Iterator[list[tuple[int, int]]]) -> float:
    """Return the mean loss over 64 rows that the training did not see."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for _ in range(64):
            row = torch.tensor([next(rows)])
            total += model(
                input_ids=row[..., 0],
                labels=row[..., 1],
                output_router_logits=False,
                use_cache=False,
            ).loss.item()
    return total / 64


def write_json(path: Path, value: object) -> None:
    """Write one small JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def save(model: Qwen3_5MoeForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint in bfloat16, with fused expert tensors as published."""
    state = {k: v.detach().to(torch.bfloat16) for k, v in model.state_dict().items()}
    copy = Qwen3_5MoeForCausalLM(deepcopy(model.config)).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.config.output_router_logits = False
    copy.save_pretrained(out, save_original_format=False)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 8192,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_json(
        out / "generation_config.json",
        {
            "eos_token_id": [2, 0],
            "pad_token_id": 0,
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
    )


def read_text(path: str) -> str:
    """Return a plain or xz-packed text."""
    if path.endswith(".xz"):
        return lzma.open(path, "rt", encoding="utf-8").read()
    return Path(path).read_text(encoding="utf-8")


def main() -> None:
    """Train, save, and print the held-out loss."""
    shakespeare, bible = (read_text(path) for path in sys.argv[1:3])
    out, minutes = Path(sys.argv[3]), float(sys.argv[4])
    out.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    use_fast_delta_rule()
    if (out / "tokenizer.json").exists():  # an earlier run's weights know only its tokens
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    else:
        tokenizer = make_tokenizer(corpus.documents(7, shakespeare, bible))
    model = make_model()
    if (out / "model.safetensors").exists():
        model.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    dist.barrier()  # nobody saves before everybody has read
    texts = shakespeare[:-HELD_OUT], bible[:-HELD_OUT]
    seen = corpus.documents(int(time.time()) + rank, *texts, dialogue_share=0.97)
    steps = train(model, tokenizer, packed(tokenizer, seen), out, minutes)
    if rank == 0:
        save(model, tokenizer, out)
        fresh = corpus.documents(5, shakespeare[-HELD_OUT:], bible[-HELD_OUT:])
        loss = held_out_loss(model, packed(tokenizer, fresh))
        print(f"held-out loss {loss} tokens trained {steps * world * ROWS * LENGTH}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
