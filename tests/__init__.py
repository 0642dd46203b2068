import pytest

# So that a failing comparison in the harness says what it compared.
pytest.register_assert_rewrite("tests.harness")
