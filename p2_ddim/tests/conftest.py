import pytest

pytest.register_assert_rewrite("p2_ddim.tests.tools")
from .tools import call, command, one_thread  # noqa: E402, F401
