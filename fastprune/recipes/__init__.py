from ..moved import attribute_of

__getattr__ = attribute_of('recipes')
