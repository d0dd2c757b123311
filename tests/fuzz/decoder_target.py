"""Has atheris look for bytes that the hand-framed decoder and protobuf read differently.

`python -m tests.fuzz.decoder_target FOLDER -max_total_time=60`, with libFuzzer's options; needs `pip install atheris`.
FOLDER gets the inputs of decoder_corpus.txt, those that found new ways through the decoder before, and what finds more.
The suite checks each line of that file, which is an input in hex.
"""

from __future__ import annotations

import sys
from pathlib import Path

CORPUS = Path(__file__).with_name("decoder_corpus.txt")


def read_corpus() -> list[bytes]:
    """The inputs: a byte that chooses the frame and whether there is a region, and what is decoded."""
    return [bytes.fromhex(line) for line in CORPUS.read_text().split()]


def check_input(data: bytes) -> str:
    """Checks one input, as the corpus has them."""
    from tests.fuzz.decoder import FRAMES, REGION, check

    names = sorted(FRAMES)
    which = data[0] if data else 0
    return check(names[which % 8], data[1:], REGION if which & 8 else None)


def main() -> None:
    """Fuzzes; does not return."""
    import atheris

    with atheris.instrument_imports(include=["attnd.protocol.frames", "attnd.protocol.regions"]):
        from attnd.protocol import frames

        assert frames
    for folder in [argument for argument in sys.argv[1:] if not argument.startswith("-")][:1]:
        for index, data in enumerate(read_corpus()):
            (Path(folder) / f"{index:04}").write_bytes(data)

    def target(data: bytes) -> None:
        check_input(data)

    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
