"""Reading what a figure says out of its SVG."""

from collections.abc import Callable
from xml.etree import ElementTree as ET

import pytest

from rankbits.reports.figures.canvas import page_svg
from rankbits.reports.figures.figure import Figure


@pytest.fixture(scope="session")
def texts() -> Callable[[Figure], list[str]]:
    """All pieces of text of a figure, in the order they are drawn."""

    def texts(figure: Figure) -> list[str]:
        root = ET.fromstring(page_svg(figure))
        return ["".join(element.itertext()).strip() for element in root.iter() if element.tag.endswith("text")]

    return texts
