"""Files of figures: SVG, PNG and CSV of one name; other files stay; what cannot be written is named."""

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from rankbits.errors import RunFolderError
from rankbits.records import RunRecord
from rankbits.reports.figures.figure import Figure
from rankbits.reports.figures.files import write_figures
from rankbits.reports.figures.training import training

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def figure(lora_run: RunRecord) -> Figure:
    made = training({"lora": lora_run})
    assert made is not None
    return made


def test_each_figure_has_three_files(tmp_path: Path, figure: Figure) -> None:
    folder = tmp_path / "new" / "figures"
    written = write_figures([figure], folder)
    assert written == [folder / "training.svg", folder / "training.png", folder / "training.csv"]
    assert sorted(path.name for path in folder.iterdir()) == ["training.csv", "training.png", "training.svg"]
    assert ET.fromstring(written[0].read_bytes()).tag == "{http://www.w3.org/2000/svg}svg"
    assert written[1].read_bytes().startswith(b"\x89PNG\r\n")
    assert written[2].read_text(encoding="utf-8") == figure.csv()


def test_older_files_are_replaced_and_others_kept(tmp_path: Path, figure: Figure) -> None:
    for name in ("training.png", "notes.txt"):
        (tmp_path / name).write_text("old")
    write_figures([figure], tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert (tmp_path / "training.png").read_bytes() != b"old"


def test_nothing_to_draw_makes_no_folder(tmp_path: Path) -> None:
    assert write_figures([], tmp_path / "figures") == []
    assert not (tmp_path / "figures").exists()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path, figure: Figure) -> None:
    (tmp_path / "figures").write_text("mine")
    with pytest.raises(RunFolderError, match="figures: cannot be made"):
        write_figures([figure], tmp_path / "figures")
    assert (tmp_path / "figures").read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_is_named_and_nothing_left_behind(tmp_path: Path, figure: Figure) -> None:
    (tmp_path / "training.png").mkdir()
    with pytest.raises(RunFolderError, match=r"training\.png: cannot be written"):
        write_figures([figure], tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
