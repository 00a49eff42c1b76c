"""What this package changes in megatron-core: all of it, installed once (`install`).

One module a fault. Its `VERSIONS` are the releases that have it; once they are all older than what is
supported (`install.SUPPORTED`), the module may go. tests/unit/test_megatron_repairs.py asks the installed
release for each fault: where that fails, `VERSIONS` must end before this release.
"""
