"""seqio's features of every task: inputs and targets, tokenised by the backbone's vocabulary.

The vocabulary is bound late: see `catalogue.use_vocabulary`.
"""

import functools

from softprompt.importing import import_seqio
from softprompt.tasks.catalogue import vocabulary_path
from softprompt.vocabulary import ByteVocabulary, Vocabulary

seqio = import_seqio()


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
