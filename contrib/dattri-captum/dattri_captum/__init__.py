"""The methods of dattri-core where code expects an influence method of captum."""

from dattri_captum.influence import MethodInfluence

__all__ = ["MethodInfluence"]
