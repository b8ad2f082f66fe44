"""The tracks that records compete in, and what each of them fixes. A new track, or a new limit, is one row here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Track:
    """What a track fixes. None leaves it open."""

    device: str | None = None  # cpu or cuda
    gpu: str | None = None  # must be part of the name of the GPU
    processes: int | None = None
    train_seconds: float | None = None  # wall clock of training
    eval_seconds: float | None = None  # wall clock of scoring
    has_fixed_tokens: bool = False  # every seed trains the same number of tokens, set by --iterations
    train_tokens: int | None = None  # that number, where the track sets it
    byte_limit: int = 16_000_000
    counts_code: bool = True  # whether the packed script counts towards the byte limit
    text_sha256: str = ""  # of the text that is scored, where it is not the whole validation set
    seeds: int = 3
    ships_artifacts: bool = False
    is_for_records: bool = True

    def count_bytes(self, artifact_bytes: int, code_bytes: int) -> int:
        """The bytes that the limit is about."""
        return artifact_bytes + code_bytes if self.counts_code else artifact_bytes


TRACKS = {
    "track_10min_16mb": Track(device="cuda", gpu="H100", processes=8, train_seconds=600.0, eval_seconds=600.0),
    "track_1gpu_16mb": Track(device="cuda", processes=1, train_seconds=600.0, eval_seconds=600.0),
    "track_pocket": Track(
        device="cpu",
        processes=1,
        has_fixed_tokens=True,
        train_tokens=16_384_000,
        byte_limit=160_000,
        counts_code=False,
        text_sha256="40a1950b90fe8120fddb08831776461ec933e9e88f6265c1c1e1fca8a5058f49",
        ships_artifacts=True,
    ),
    # the challenge's own, for entries out of competition
    "track_non_record_16mb": Track(seeds=1, is_for_records=False),
}
ANY_TRACK = Track(seeds=1)  # what holds where a folder names no track
