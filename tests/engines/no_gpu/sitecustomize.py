"""On the path of every process of SGLang on a CPU: packages made for GPUs are there by name, and raise when used.

SGLang imports them whatever it runs on. Nothing here computes: a function of a stand-in is a RuntimeError.
"""

import importlib.abc
import importlib.machinery
import sys
import types

GPU_ONLY = ("sgl_kernel", "torchvision")


class Absent(type):
    """A name of a package that is not here: may be imported, subclassed and looked into, not called."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args, **kwargs):
        raise RuntimeError(f"{cls.__name__} is for GPUs, and not installed here")


class Module(types.ModuleType):
    """A module of such names."""

    __version__ = "0.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}", (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages named above, and their submodules."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in GPU_ONLY:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        module.__path__ = []


sys.meta_path.append(Finder())
