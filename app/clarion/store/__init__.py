"""The only caller of SQL about jobs: one method per file in `sql/queries`, of the same name.

Every method takes a set and answers in the order of its input where the file says so. All raise `Unavailable` for
weather and `Unstorable` for a value that Postgres refuses; then the whole set is undone.
"""

from clarion.store.commands import Commands
from clarion.store.execution import Execution
from clarion.store.reading import Reading
from clarion.store.upkeep import Ground, Upkeep

__all__ = ["Ground", "Store"]


class Store(Commands, Execution, Reading, Upkeep):
    """Jobs in Postgres, as sets."""
