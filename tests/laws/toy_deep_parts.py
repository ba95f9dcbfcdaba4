"""Toy inverse Hessians by many steps, at fault with few of them or with many."""

from attrs import evolve, frozen
from toy_world_parts import ToyInverseHessian


@frozen
class ToyDeep(ToyInverseHessian):
    """Takes ``depth`` steps; its fault shows with fewer, or with more, than 100."""

    depth: int = 500
    deep: bool = False

    def fit(self, problem):
        faulty = self.deep == (self.depth > 100)
        return super(ToyDeep, self if faulty else evolve(self, fault="")).fit(problem)
