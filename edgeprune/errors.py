"""Every error that edgeprune raises on purpose, and the exit code each one ends the command line with.

    EdgepruneError                 1   anything of ours
    |-- UsageError                 2   an option or argument is wrong
    |-- ModelFileError             3   a model file cannot be read, or is refused
    |-- UnsupportedModelError      4   a network cannot be brought to the canonical form, cut or exported
    |-- DataError                  5   a data set cannot be read
    |-- DeviceError                6   a target is unknown, unreachable or answered nonsense
    |-- TableError                 7   a latency table lacks a row, or belongs to another device
    |-- BudgetUnreachableError     8   no plan can meet the budget
    |-- BudgetMissedError          9   the file that was built measures above the budget
    `-- VerificationError         10   the exported file does not compute what the network computes

A message says what happened, what was expected, and the command that mends it.
"""


class EdgepruneError(Exception):
    """Base class: ``str(error)`` is one readable line, ``exit_code`` what the process ends with."""

    exit_code = 1


class UsageError(EdgepruneError):
    exit_code = 2


class ModelFileError(EdgepruneError):
    exit_code = 3


class UnsupportedModelError(EdgepruneError):
    exit_code = 4


class DataError(EdgepruneError):
    exit_code = 5


class DeviceError(EdgepruneError):
    exit_code = 6


class TableError(EdgepruneError):
    exit_code = 7


class BudgetUnreachableError(EdgepruneError):
    exit_code = 8


class BudgetMissedError(EdgepruneError):
    """``result``: the compression that missed (an ``edgeprune.pipeline.results.Compression``), where there is one."""

    exit_code = 9
    result: object = None


class VerificationError(EdgepruneError):
    exit_code = 10
