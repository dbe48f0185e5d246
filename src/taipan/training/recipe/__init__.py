"""What a run is to do: the recipe, its keys, and how it is read."""

from taipan.training.recipe.recipe import (
    SLOWEST_IN_INT8,
    DataSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    Recipe,
    ScheduleSection,
    TrainingSection,
    apply_override,
)

__all__ = [
    "SLOWEST_IN_INT8",
    "DataSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "Recipe",
    "ScheduleSection",
    "TrainingSection",
    "apply_override",
]
