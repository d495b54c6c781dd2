import pytest

from train.config import OptimConfig
from train.step.schedule import learning_rate


def rates(steps: int, **fields: object) -> list[float]:
    optim = OptimConfig.model_validate({"lr": 1.0, **fields})
    return [round(learning_rate(optim, step, steps), 6) for step in range(steps)]


def test_the_first_update_already_has_its_rate() -> None:
    assert rates(4) == [1.0, 1.0, 1.0, 1.0]
    assert rates(5, warmup=3) == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [0.5, 1.0, 0.75, 0.5, 0.25]), ("cosine", [0.5, 1.0, 0.853553, 0.5, 0.146447])],
)
def test_decays_after_the_warm_up(schedule: str, expected: list[float]) -> None:
    assert rates(5, schedule=schedule, warmup=1) == expected
