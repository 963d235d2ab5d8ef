"""Documents of any length -> rows for training on long sequences, with Hugging Face datasets.

A packed row has exactly `length` tokens. Documents follow each other in it, whole where they fit (`packing`), with
`position_ids` that restart at 0 where a document (or the rest of one) begins:

    input_ids      a0 a1 a2 a3 | b0 b1 b2 | pad pad      labels   -100 a1 a2 a3 | -100 b1 b2 | -100 -100
    position_ids    0  1  2  3 |  0  1  2 |  0   1

so attention stays inside a document and no token is predicted from another document's last one. The padding of a row
is more documents, short ones: it costs no attention worth mentioning. Such rows need no collator of their own and no
attention mask; `Collator` adds `cu_seq_lens` for models that tell documents apart only by those, and pads whole
documents.

`build_once` keeps what is made of a text in a folder that all processes share: one of them builds, behind a file lock,
the others wait and map the same files.
"""

from .build_once import build_once
from .collator import Collator, pad_id
from .rows import load_rows, pack, tokenize, whole
from .writing import PADDING_DOCUMENT

__all__ = ["PADDING_DOCUMENT", "Collator", "build_once", "load_rows", "pack", "pad_id", "tokenize", "whole"]
