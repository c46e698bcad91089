"""No module of finetune needs another that needs it: each can be read, and tested, after those that it builds on.

Imports inside functions and those for type checkers alone count as well: they hide a circle, they do not end it.
"""

from graphlib import CycleError, TopologicalSorter

import grimp  # what import-linter reads imports with


def test_imports_go_round_in_no_circle() -> None:
    graph = grimp.build_graph("finetune", exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in sorted(graph.modules)}
    assert imports["finetune.steps.train.reporting.callback"] >= {"finetune.steps.train.trainer.resumable"}  # for types
    assert "finetune.steps.token_matrices.resizing" in imports["finetune.steps.token_matrices.architectures"]  # inside
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))  # it lists the imported before those that import them
        raise AssertionError(f"imports in a circle: {circle}") from None
