"""transformers' `tokenizer.json` of a T5 as the SentencePiece model that it was made of.

transformers 5 saves a tokenizer as that file alone. It holds what segments a text: the pieces with
their scores (a unigram model) and SentencePiece's table of normalisation.
"""

import base64
import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from softprompt import checkpoint
from softprompt.vocabulary import EOS_ID, EXTRA_IDS, PAD_ID, UNK_ID

FILE = "tokenizer.json"
SENTINELS = [f"<extra_id_{i}>" for i in reversed(range(EXTRA_IDS))]


def sentencepiece_file(path: pathlib.Path) -> pathlib.Path | None:
    """A SentencePiece model of the tokenizer in `path`, in the user's cache; None if no T5's.

    T5's 100 sentinels, which `Vocabulary` appends, are left out of it.

    Raises:
      ValueError: the file is not what transformers writes.
    """
    content = checkpoint.read_object(path)
    unigram = content.get("model")
    if not isinstance(unigram, dict) or unigram.get("type") != "Unigram":
        return None
    try:
        model = _model(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{str(path)!r} is no tokenizer of a T5: {reason}") from None
    target = checkpoint.cache_folder() / "vocabularies"
    target = target / f"{hashlib.sha256(model).hexdigest()[:16]}.model"
    if not target.is_file():
        _check(model, path)
        # Of several processes each may have a cache of its own.
        checkpoint.replace(target, model)
    return target


def _check(model: bytes, path: pathlib.Path) -> None:
    """Raises unless SentencePiece takes the model: pieces may be there twice, or none at all."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} is no tokenizer of a T5: {reason}") from None


def added_tokens(content: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of a `tokenizer.json` that are matched before a text is segmented, and their ids."""
    found = content.get("added_tokens") or []
    return {
        x["content"]: x["id"] for x in found if isinstance(x, dict) and {"content", "id"} <= {*x}
    }


def _model(content: Mapping[str, Any]) -> bytes:
    """The serialized SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    unigram = content["model"]
    if unigram["unk_id"] != UNK_ID:
        raise ValueError(f"the id of its unknown token is {unigram['unk_id']}, expected {UNK_ID}")
    pieces = unigram["vocab"]
    if [piece for piece, _ in pieces[-EXTRA_IDS:]] == SENTINELS:
        pieces = pieces[:-EXTRA_IDS]
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    special = {PAD_ID: kinds.CONTROL, EOS_ID: kinds.CONTROL, UNK_ID: kinds.UNKNOWN}
    verbatim = {token for token, i in added_tokens(content).items() if i > UNK_ID}
    fallback = bool(unigram.get("byte_fallback"))
    model = sentencepiece_model_pb2.ModelProto()
    for i, (piece, score) in enumerate(pieces):
        kind = special.get(i, kinds.NORMAL)
        if piece in verbatim or re.fullmatch(r"▁?<extra_id_\d+>", piece):
            kind = kinds.USER_DEFINED
        elif fallback and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            kind = kinds.BYTE
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.UNIGRAM
    trainer.vocab_size, trainer.byte_fallback = len(pieces), fallback
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = PAD_ID, EOS_ID, UNK_ID, -1
    model.normalizer_spec.precompiled_charsmap = _character_map(content.get("normalizer"))
    return model.SerializeToString()


def _character_map(normalizer: Any) -> bytes:
    """SentencePiece's own table among the steps of a normalizer; nothing where there is none."""
    if not isinstance(normalizer, dict):
        return b""
    if text := normalizer.get("precompiled_charsmap"):
        return base64.b64decode(text)
    found = map(_character_map, normalizer.get("normalizers") or [])
    return next(filter(None, found), b"")
