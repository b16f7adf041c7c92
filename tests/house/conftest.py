"""The tiny model that most of these tests draw with, and what it draws by the dense plan."""

import pytest

from tests.house import support


@pytest.fixture(scope="module")
def generator():
    return support.plain_generator()


@pytest.fixture(scope="module")
def plain():
    return support.plain_picture()
