"""The tiny world's two tokenizers, and how a prompt becomes the two conditions of HunyuanVideo.

The Llama side splits at words, punctuation and line ends, and knows every word of the captions and
of diffusers' prompt template, whose text before the prompt then takes exactly 95 tokens: the
`crop_start` of the full model. The CLIP side is byte-level BPE, learnt until every caption word is
one token. Words that neither knows still encode: as <|unk|> by the first, as letters by the second.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel, PreTrainedTokenizerFast

from fastgrpo.data.tiny_world import shapes

SPECIAL = ("<|pad|>", "<|unk|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PIECE = r"\w+|[^\w\s]|\n"
LAYERS_TO_SKIP = 2  # of the Llama: hidden_states[-3] is the condition


def caption_words() -> list[str]:
    """The words of all captions, sorted."""
    return sorted(
        {word for text in shapes.captions(list(chain(*shapes.meanings()))) for word in text.split()}
    )


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; pads on the right."""
    template = re.sub(r"<\|\w+\|>|\{\}", " ", DEFAULT_PROMPT_TEMPLATE["template"]).lower()
    pieces = sorted({*re.findall(PIECE, template), *caption_words()})
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        additional_special_tokens=list(SPECIAL[2:]),
        padding_side="right",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def merges_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding, most frequent pair first, until every word is one piece.

    Ties go by the alphabet: the trainer of the tokenizers library breaks them differently in every
    process.
    """
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in split for pair in pairwise(pieces)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for pieces in split:
            for at in range(len(pieces) - 2, -1, -1):
                if (*pieces[at : at + 2],) == best:
                    pieces[at : at + 2] = ["".join(best)]
    return merges


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE with the CLIP class' own rules; every caption word is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = merges_of(caption_words())
    pieces = [
        *alphabet,
        *(f"{letter}</w>" for letter in alphabet),
        *("".join(pair) for pair in merges),
    ]
    vocabulary = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=merges, model_max_length=77
    )


def crop_start(tokenizer: PreTrainedTokenizerFast) -> int:
    """The number of tokens of the prompt template before the prompt."""
    before, _ = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
    return len(tokenizer(before).input_ids)


def encode(tokenizer: PreTrainedTokenizerFast, llama: LlamaModel, prompts: Sequence[str]) -> Tensor:
    """Hidden states of the prompts' tokens and the end-of-turn token, after the template.

    Nothing is padded. Raises ValueError where the prompts' lengths in tokens differ.

    prompts: B texts of one length in tokens;  returns float32 [B, L, D]
    """
    rows = tokenizer([DEFAULT_PROMPT_TEMPLATE["template"].format(p) for p in prompts]).input_ids
    if len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"prompts={list(prompts)}: their lengths in tokens differ; encode equal lengths "
            "together"
        )
    hidden = llama(input_ids=torch.tensor(rows), output_hidden_states=True).hidden_states
    cropped: Tensor = hidden[-(LAYERS_TO_SKIP + 1)][:, crop_start(tokenizer) :]
    return cropped


def encode_pooled(
    tokenizer_2: CLIPTokenizer, clip: CLIPTextModel, prompts: Sequence[str]
) -> Tensor:
    """CLIP's pooled output of the bare prompts.  returns float32 [B, D]"""
    tokens = tokenizer_2(
        list(prompts), padding="longest", max_length=77, truncation=True, return_tensors="pt"
    )
    pooled: Tensor = clip(tokens.input_ids).pooler_output
    return pooled
