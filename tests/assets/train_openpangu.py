"""Train the small openPangu of the tests: `python tests/assets/train_openpangu.py tests/assets/openpangu-tiny`.

The published architecture (a Llama with biases on q, k, v and o, grouped queries, tied embeddings) with two million
parameters and a SentencePiece vocabulary of its own, on packaged text that the tests' held-out corpus is no part of.
Writes a checkpoint as published (config.json of type PanguEmbedded, tokenizer.model, safetensors with the stale
`inv_freq` buffers) and training.json with the figures. Takes minutes on two cores; other machines round differently.
"""

import argparse
import json
import math
import time
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import LlamaForCausalLM

from evaluators.corpora import Corpus, documents, evaluation_windows
from evaluators.perplexity import perplexity
from orchestrator.models.loading import load_tokenizer
from orchestrator.models.openpangu import llama_config

SEED = 0
CORPORA = ("squad-contexts", "coqa-stories", "drop-passages", "lambada")
HELD_OUT = "boolq-passages"
LENGTH, BATCH, STEPS, WARMUP = 256, 16, 1000, 50
RATE, DECAY, CLIP = 3e-3, 0.1, 1.0
CONFIG = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "model_type": "PanguEmbedded",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 4000000.0,
    "bias": True,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
SPECIAL = [f"[unused{index}]" for index in range(18)]
# What the published template says, in fewer words.
ROLES = {"system": "系统", "user": "用户", "assistant": "助手", "tool": "工具", "function": "方法"}
TEMPLATE = (
    "{% set names = " + json.dumps(ROLES, ensure_ascii=False) + " %}"
    "{% if messages and messages[0]['role'] != 'system' %}[unused9]系统：[unused10]{% endif %}"
    "{% for turn in messages %}"
    "{{ '[unused9]' + names[turn['role']] + '：' + turn['content'] + '[unused10]' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[unused9]助手：{% endif %}"
)


def write_tokenizer(texts, directory):
    """A vocabulary of pieces, bytes and the special pieces; returns the id of EOS."""
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines() if line.strip()),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=CONFIG["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=SPECIAL,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "PanguTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]},
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(pieces.PieceToId(token)): {"content": token} | flags for token in ("<unk>", "<s>", "</s>", *SPECIAL)
        },
        "bos_token": "<s>",
        "eos_token": "[unused10]",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
    return pieces.PieceToId("[unused10]")


def train(model, tokens):
    """AdamW with warmup and a cosine to nothing, on windows drawn by the seed; returns the last 50 steps' mean loss."""
    matrices = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    generator, losses = torch.Generator().manual_seed(SEED), []
    for step in range(STEPS):
        warm, left = (step + 1) / WARMUP, (1 + math.cos(math.pi * step / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(warm, left)
        starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH,), generator=generator).tolist()
        batch = torch.stack([tokens[start : start + LENGTH + 1] for start in starts])
        logits = model(input_ids=batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f}", flush=True)
    return sum(losses[-50:]) / 50


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.directory.mkdir(parents=True, exist_ok=True)
    texts = [text for name in CORPORA for text in documents(Corpus(name=name))]
    config = CONFIG | {"eos_token_id": write_tokenizer(texts, args.directory)}
    (args.directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer = load_tokenizer(args.directory)
    tokens = torch.tensor([token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]])
    model = LlamaForCausalLM(llama_config(config, "config.json")).float()
    started = time.perf_counter()
    loss = train(model, tokens)
    seconds = time.perf_counter() - started
    state = {name: value.detach().bfloat16() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    stale = torch.zeros(model.config.head_dim // 2)  # published files carry these; no class reads them
    state |= {
        f"model.layers.{index}.self_attn.rotary_emb.inv_freq": stale.clone() for index in range(len(model.model.layers))
    }
    save_file(state, args.directory / "model.safetensors", metadata={"format": "pt"})
    model.bfloat16().eval()
    windows = evaluation_windows(Corpus(name=HELD_OUT), tokenizer, sequence_length=256, max_windows=64)
    figures = {
        "made_by": "python tests/assets/train_openpangu.py tests/assets/openpangu-tiny",
        "seed": SEED,
        "parameters": sum(value.numel() for value in model.parameters()),
        "corpora": list(CORPORA),
        "corpus_tokens": len(tokens),
        "trained_tokens": STEPS * BATCH * LENGTH,
        "seconds": round(seconds),
        "torch": torch.__version__,
        "last_training_loss": round(loss, 4),
        "held_out": f"{HELD_OUT}, 64 windows of 256 tokens",
        "held_out_perplexity": round(perplexity(model, windows).perplexity, 3),
    }
    (args.directory / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
