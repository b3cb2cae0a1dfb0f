"""SentencePiece vocabularies in T5's convention, without TensorFlow.

T5's vocabularies have pad = 0, eos = 1, unk = 2, and append `extra_ids` sentinels
`<extra_id_0> … <extra_id_99>` to the end in descending order, so that `<extra_id_0>` is the last
id (Raffel et al. 2020, section 3.1.4). Ids agree with `seqio.SentencePieceVocabulary`.
"""

import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
EXTRA_IDS = 100
EMBEDDED = pathlib.Path(__file__).parent / "embedded" / "backbone" / "spiece.model"


class Vocabulary:
    """A SentencePiece model plus sentinels.

    Two vocabularies are equal when their pieces are, wherever their files lie. `extra_ids` (None:
    100, but none for a model that holds sentinels of its own, as mT5's does) are appended.

    >>> vocabulary = Vocabulary("spiece.model")
    >>> vocabulary.encode("a fine film")
    [9, 1530, 1220]
    """

    def __init__(self, path: str | os.PathLike, extra_ids: int | None = None):
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        self.path = str(path)
        try:
            serialized = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"cannot read the SentencePiece model {self.path!r}: {error.strerror}"
            ) from None
        model = sentencepiece_model_pb2.ModelProto()
        try:
            model.ParseFromString(serialized)
        except Exception:
            raise ValueError(f"{self.path!r} is not a SentencePiece model") from None
        if not model.pieces:
            raise ValueError(f"{self.path!r} is not a SentencePiece model: it holds no pieces")
        if extra_ids is None:
            own = any(p.piece in ("<extra_id_0>", "▁<extra_id_0>") for p in model.pieces)
            extra_ids = 0 if own else EXTRA_IDS
        self.extra_ids = extra_ids
        self._hash = hashlib.sha256(
            "\n".join(p.piece for p in model.pieces).encode() + str(extra_ids).encode()
        ).hexdigest()
        for i in reversed(range(extra_ids)):
            model.pieces.add(
                piece=f"▁<extra_id_{i}>",
                score=0.0,
                type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED,
            )
        try:
            self._processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.path!r} is not a SentencePiece model: {reason}") from None

    @property
    def size(self) -> int:
        """Number of ids, sentinels included (32,100 for T5's)."""
        return self._processor.GetPieceSize()

    @property
    def fingerprint(self) -> str:
        """Hash of the pieces; the same for every copy of one vocabulary."""
        return self._hash[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without EOS."""
        return self._processor.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without EOS."""
        return self._processor.Encode(list(texts)) if texts else []

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first EOS; padding and ids out of range are left out."""
        kept = []
        for i in ids:
            if i == EOS_ID:
                break
            if PAD_ID < i < self.size:
                kept.append(int(i))
        return self._processor.DecodeIds(kept)

    def piece(self, i: int) -> str:
        """The piece with id `i`."""
        return self._processor.IdToPiece(int(i))

    def sentinel(self, i: int) -> int:
        """Id of `<extra_id_i>`, which some models hold without the blank before it."""
        names = (f"▁<extra_id_{i}>", f"<extra_id_{i}>")
        found = [n for n in map(self._processor.PieceToId, names) if n != UNK_ID]
        if not found:
            raise ValueError(f"the vocabulary {self.path!r} has no sentinel {names[1]}")
        return found[0]

    def __eq__(self, other):
        return isinstance(other, Vocabulary) and self._hash == other._hash

    def __hash__(self):
        return hash(self._hash)


class ByteVocabulary:
    """ByT5's vocabulary (Xue et al. 2022, section 3.1): id = byte + 3, then 125 ids without use.

    ByT5 takes the last bytes, which UTF-8 hardly has, for sentinels. Ids agree with
    `seqio.ByteVocabulary(extra_ids=125)`. Its path is the word 'bytes'.
    """

    path = BYTES = "bytes"
    extra_ids = 125
    size = 3 + 256 + 125
    fingerprint = BYTES

    def encode(self, text: str) -> list[int]:
        """Ids of the UTF-8 bytes of `text`, without EOS."""
        return [byte + 3 for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without EOS."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first EOS; ids that are no byte and broken UTF-8 are left out."""
        kept = itertools.takewhile(lambda i: i != EOS_ID, ids)
        return bytes(int(i) - 3 for i in kept if 3 <= i < 259).decode(errors="ignore")

    def piece(self, i: int) -> str:
        """The character or `<0x..>` with id `i`."""
        if not 3 <= i < 259:
            return {0: "<pad>", 1: "</s>", 2: "<unk>"}.get(int(i), f"<extra_id_{i - 259}>")
        return chr(i - 3) if 32 <= i - 3 < 127 else f"<0x{i - 3:02X}>"

    def sentinel(self, i: int) -> int:
        """Id of sentinel i, counted from the last byte."""
        return 258 - i

    def __eq__(self, other):
        return isinstance(other, ByteVocabulary)

    def __hash__(self):
        return hash(self.BYTES)


AnyVocabulary = Vocabulary | ByteVocabulary


def open_vocabulary(path: str | os.PathLike) -> AnyVocabulary:
    """The vocabulary in a SentencePiece file; 'bytes' is ByT5's, 'embedded' the package's own."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"VOCABULARY_FILE is {path!r}, expected a path, 'bytes' or 'embedded'")
    if str(path) == ByteVocabulary.BYTES:
        return ByteVocabulary()
    return Vocabulary(EMBEDDED if str(path) == "embedded" else path)


def read_documents(path: str | os.PathLike) -> Iterator[str]:
    """Texts of a JSON Lines file with a `text` field, in UTF-8 (BOM or not); blank lines are none.

    Compressed files (`.gz`, `.xz`, `.zst`) are read by their ending.

    Raises:
      ValueError: the file cannot be read, is torn or is not what its ending says, or a line (named)
        is no JSON object with such a text.
    """
    import lzma
    import zlib

    import zstandard

    broken = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error)
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(line, f"{path}:{number}")
    except (*broken, zstandard.ZstdError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the text {str(path)!r}: {reason}") from None


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # Fails for half of a surrogate pair, which JSON can escape.
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{where}: expected a JSON object with a text in the field 'text', got {line[:60]!r}"
        ) from None
    return text


def open_text(path: str | os.PathLike) -> io.TextIOBase:
    """Opens a text in UTF-8 (BOM or not), through gzip, xz or zstandard by its ending."""
    import gzip
    import lzma

    openers = {".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zstandard}
    raw = openers.get(pathlib.Path(path).suffix, open)(path, "rb")
    return io.TextIOWrapper(raw, encoding="utf-8-sig")


def _open_zstandard(path: str | os.PathLike, mode: str) -> io.BufferedReader:
    return io.BufferedReader(_Zstandard(open(path, mode)))


class _Zstandard(io.RawIOBase):
    """What a zstandard file's frames hold; EOFError where it ends within one.

    `zstandard.open` takes a torn file for a shorter one.
    """

    def __init__(self, file: Any):
        self._file, self._chunks, self._left = file, self._unpack(file), memoryview(b"")

    @staticmethod
    def _unpack(file: Any) -> Iterator[bytes]:
        import zstandard

        frame = None
        while block := file.read(1 << 17):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame is not None:
            raise EOFError("the file ends within a zstandard frame")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def train(
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    size: int = 8000,
    sentences: int = 800_000,
) -> None:
    """Trains a unigram SentencePiece model of `size` pieces on JSON Lines, written to `output`.

    Settings are T5's: pad, eos and unk are 0, 1 and 2, no bos, NFKC normalisation. The first
    `sentences` paragraphs of the inputs, in their order, are used.
    """
    import sentencepiece

    from softprompt import checkpoint

    pathlib.Path(output).absolute().parent.mkdir(parents=True, exist_ok=True)
    paragraphs = (line for path in inputs for d in read_documents(path) for line in d.split("\n"))
    model = io.BytesIO()
    first = next(paragraphs, None)
    if first is None:
        raise ValueError(f"{', '.join(map(str, inputs))} hold no text to train a vocabulary on")
    texts = itertools.chain([first], paragraphs)
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=itertools.islice(texts, sentences),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            character_coverage=0.9995,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            max_sentence_length=8000,
            num_threads=os.cpu_count(),
            minloglevel=1,
        )
    except RuntimeError as error:
        raise ValueError(f"no vocabulary of {size} pieces from this text: {error}") from None
    checkpoint.write_atomically(output, model.getvalue())
