"""What a run is to do: the recipe, its keys, and how it is read."""

from taipan.training.recipe.recipe import (
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
    "DataSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "Recipe",
    "ScheduleSection",
    "TrainingSection",
    "apply_override",
]
