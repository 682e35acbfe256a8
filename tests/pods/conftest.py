"""The mark of tests that compile for TPUs, which any machine can do once libtpu is installed from PyPI."""


def pytest_configure(config):
    config.addinivalue_line("markers", "libtpu: compiles for TPUs through libtpu, without one; skipped where it is not")
