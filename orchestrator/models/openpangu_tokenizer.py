"""openPangu's tokenizer over its `tokenizer.model` (SentencePiece), without remote code.

A text is cut at the special pieces; what lies between them is SentencePiece's, and BOS is put before the whole. The
conversation is a text too: `apply_chat_template(tokenize=True)` of the released tokenizer leaves BOS out, its own
inference script renders first and tokenizes then, which puts it there, and so does the evaluation here.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import sentencepiece
from transformers import AddedToken, PreTrainedTokenizer

_VOCABULARY = "tokenizer.model"


class PanguTokenizer(PreTrainedTokenizer):  # type: ignore[misc]  # transformers is not typed
    """The tokenizer of openPangu-Embedded 1B and 7B.

    Args:
        vocab_file: `tokenizer.model`.
        add_bos_token: put BOS before a text.
        add_eos_token: put EOS after it.
        kwargs: as in tokenizer_config.json.
    """

    vocab_files_names = {"vocab_file": _VOCABULARY}  # noqa: RUF012 - transformers' own form
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, add_bos_token: bool = True, add_eos_token: bool = False, **kwargs: Any) -> None:
        """Read the vocabulary.

        Raises:
            ValueError: a special token is no piece of the vocabulary, or has another id there.
        """
        self.vocab_file, self.add_bos_token, self.add_eos_token = vocab_file, add_bos_token, add_eos_token
        self._pieces = sentencepiece.SentencePieceProcessor()
        self._pieces.Load(vocab_file)
        self._check(kwargs.get("added_tokens_decoder", {}))
        super().__init__(add_bos_token=add_bos_token, add_eos_token=add_eos_token, **kwargs)

    def _check(self, added: dict[int, AddedToken]) -> None:
        for index, token in added.items():
            found = self._pieces.PieceToId(str(token))
            if found != int(index) or self._pieces.IdToPiece(found) != str(token):
                raise ValueError(
                    f"tokenizer_config.json says that {token} is token {index}, and tokenizer.model that it is {found}"
                )

    @property
    def vocab_size(self) -> int:
        """Pieces, special ones included."""
        return int(self._pieces.GetPieceSize())

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id."""
        vocabulary = {str(self._pieces.IdToPiece(index)): index for index in range(self.vocab_size)}
        vocabulary.update(self.added_tokens_encoder)
        return vocabulary

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(self._pieces.EncodeAsPieces(text))

    def _convert_token_to_id(self, token: str) -> int:
        return int(self._pieces.PieceToId(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self._pieces.IdToPiece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces: special ones stand as they are, SentencePiece joins what lies between."""
        special, text = set(self.added_tokens_encoder), ""
        ordinary: list[str] = []
        for token in tokens:
            if token in special:
                text += self._pieces.DecodePieces(ordinary) + token
                ordinary = []
            else:
                ordinary.append(token)
        return str(text + self._pieces.DecodePieces(ordinary))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """BOS, the text (or two, one after the other), EOS where asked for."""
        start = [self.bos_token_id] if self.add_bos_token else []
        end = [self.eos_token_id] if self.add_eos_token else []
        return start + token_ids_0 + (token_ids_1 or []) + end

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy `tokenizer.model`; returns where to."""
        target = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + _VOCABULARY)
        if os.path.abspath(target) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, target)
        return (target,)
