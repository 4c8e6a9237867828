"""The images that predict finds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from freqfusion.data import BadSampleError
from freqfusion.prediction import inputs as sources
from freqfusion.prediction.inputs import open_source, upright


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def names(source: Any, out: Path) -> dict[str, Path]:
    return {picture.file: picture.name for picture in open_source(source, out).pictures}


def test_a_folder_keeps_relative_paths_and_tells_suffixes_apart(tmp_path: Path) -> None:
    for name in ("b/x.jpg", "x.JPG", "b/y.png", "b/Y.jpeg", "notes.txt", ".hidden.png", "out/masks/x.png"):
        touch(tmp_path / name)
    assert names(tmp_path, tmp_path / "out") == {
        "x.JPG": Path("x"),
        "b/x.jpg": Path("b/x"),
        "b/y.png": Path("b/y.png"),
        "b/Y.jpeg": Path("b/Y.jpeg"),
    }
    assert open_source(tmp_path, tmp_path / "out").count == 4


def test_any_single_file_is_taken(tmp_path: Path) -> None:
    path = touch(tmp_path / "scan.weird")
    assert names(path, tmp_path / "out") == {"scan.weird": Path("scan")}


def test_a_pattern(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.png", "b/1.jpg", "b/c/3.jpg", "4.jpg"):
        touch(tmp_path / name)
    found = names(f"{tmp_path}/*/*.jpg", tmp_path / "out")
    assert list(found.values()) == [Path("a/1"), Path("b/1")]
    found = names(f"{tmp_path}/b/**/*.jpg", tmp_path / "out")
    assert list(found.values()) == [Path("1"), Path("c/3")]
    with pytest.raises(FileNotFoundError, match=r"no image fits the pattern .*\*\.tif; looked for \.bmp"):
        open_source(f"{tmp_path}/*.tif", tmp_path / "out")


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        open_source(tmp_path / "nowhere", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no image in .* looked for \.bmp"):
        open_source(tmp_path, tmp_path / "out")


def write_video(path: Path, frames: int = 5) -> Path:
    """Grey frames, each lighter than the one before."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(frames):
            grey = np.full((32, 48, 3), 40 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.mark.parametrize("reader", ["av", "cv2"])
def test_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str) -> None:
    path = write_video(tmp_path / "clip.mp4")
    pytest.importorskip(reader)
    find = sources.find_spec
    monkeypatch.setattr(sources, "find_spec", lambda name: find(name) if name == reader else None)
    source = open_source(path, tmp_path / "out")
    assert source.count == 5
    pictures = [(picture.name, picture.read()) for picture in source.pictures]
    assert [name for name, _ in pictures] == [Path("clip", f"{i:06d}") for i in range(5)]
    for number, (_, image) in enumerate(pictures):
        assert image.shape == (3, 32, 48)
        assert image.dtype == torch.uint8
        assert abs(float(image.float().mean()) - 40 * number) < 6


def test_a_video_without_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "freqfusion\[video\]"'):
        open_source(touch(tmp_path / "clip.mp4"), tmp_path / "out")


def test_a_broken_video(tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"no video" * 100)
    with pytest.raises(BadSampleError, match=r"clip\.mp4: cannot be read as a video"):
        open_source(path, tmp_path / "out")


def test_frames_are_turned_upright() -> None:
    frame = np.arange(6).reshape(2, 3, 1)
    assert upright(frame, 0)[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert upright(frame, 90)[..., 0].tolist() == [[2, 5], [1, 4], [0, 3]]
    assert upright(frame, -90)[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]
