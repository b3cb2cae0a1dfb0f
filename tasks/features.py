"""The features of every task: inputs and targets, tokenised by the backbone's vocabulary.

A task is registered before it is known which backbone it will feed, so the vocabulary is bound
late: `use_vocabulary(path)` names the SentencePiece model (the training, evaluation and inference
binaries do so from the backbone), else the embedded backbone's is used.
"""

import functools
import os

import seqio

from softprompt.vocabulary import EMBEDDED, ByteVocabulary, Vocabulary

_path: str | None = None


def use_vocabulary(path: str | os.PathLike | None) -> None:
    """Makes all tasks tokenise with the SentencePiece model at `path`.

    None is the embedded one, 'bytes' ByT5's vocabulary.
    """
    global _path
    _path = None if path is None else str(path)


def vocabulary_path() -> str:
    """What `use_vocabulary` named last, as `softprompt.vocabulary.open_vocabulary` takes it."""
    return _path or str(EMBEDDED)


@functools.lru_cache(maxsize=8)
def _load(path: str) -> seqio.Vocabulary:
    if path == ByteVocabulary.BYTES:
        return seqio.ByteVocabulary(extra_ids=ByteVocabulary.extra_ids)
    return seqio.SentencePieceVocabulary(path, extra_ids=Vocabulary(path).extra_ids)


class BackboneVocabulary(seqio.Vocabulary):
    """A seqio vocabulary that stands for whichever one `use_vocabulary` named last."""

    def __init__(self):
        super().__init__(extra_ids=0)

    @property
    def target(self) -> seqio.Vocabulary:
        return _load(vocabulary_path())

    @property
    def bos_id(self):
        return self.target.bos_id

    @property
    def eos_id(self):
        return self.target.eos_id

    @property
    def unk_id(self):
        return self.target.unk_id

    @property
    def _base_vocab_size(self):
        return self.target.vocab_size

    def _encode(self, s):
        return self.target.encode(s)

    def _decode(self, ids):
        return self.target.decode(ids)

    def _encode_tf(self, s):
        return self.target.encode_tf(s)

    def _decode_tf(self, ids):
        return self.target.decode_tf(ids)

    def __eq__(self, other):
        return isinstance(other, BackboneVocabulary)

    __hash__ = object.__hash__


VOCABULARY = BackboneVocabulary()

FEATURES = {
    "inputs": seqio.Feature(vocabulary=VOCABULARY, add_eos=True, required=False),
    "targets": seqio.Feature(vocabulary=VOCABULARY, add_eos=True),
}
