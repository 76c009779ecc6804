"""A pretended GPU, to find on the CPU what would fail on CUDA or on Apple's MPS.

Within `with PretendedDevice("cuda"):` there seems to be such a device. Its tensors compute on
the CPU, but it refuses what the device would refuse: tensors of both devices in one operation,
numpy() before cpu(), a generator of the other device, and float64 on "mps". It shows nothing
of speed and rounding, nor which operations a device lacks.

As PYTHONSTARTUP of a notebook's kernel it is in force from the start, with the name in
PRETENDED_DEVICE; `python tests/environments.py "pretended CUDA"` runs the notebooks so.
"""

import contextlib
import os
from unittest import mock

import torch
import torch._dynamo  # otherwise imported by the first optimizer, amid what is replaced below
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# Their result is a Python object: on a GPU, the host waits for it.
TO_PYTHON = {
    *(Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__),
    *(Tensor.__index__, Tensor.__format__, Tensor.__repr__),
}
ACROSS = {Tensor.copy_, torch.as_tensor, torch.tensor}  # they take tensors of any device


class DeviceTensor(Tensor):
    """A tensor that passes for one on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __reduce_ex__(self, protocol):
        return on_cpu(self).__reduce_ex__(protocol)


class DeviceGenerator(torch.Generator):
    """A generator that passes for one on the device."""


def is_on_device(x):
    return isinstance(x, DeviceTensor | DeviceGenerator)


def on_cpu(x):
    return x.as_subclass(Tensor) if isinstance(x, DeviceTensor) else x


class PretendedDevice(TorchFunctionMode):
    """Context in which the device "cuda", of a compute capability, or "mps" seems to exist."""

    def __init__(self, kind, capability=(8, 0)):
        super().__init__()
        self.kind, self.device = kind, torch.device(kind, 0)
        self.replaced = [
            (torch, "Generator", self.generator_class()),
            (torch, "autocast", self.autocast(torch.autocast)),
            (nn.Module, "to", self.module_to(nn.Module.to)),
            (DeviceGenerator, "device", self.device),
        ]
        if kind == "cuda":
            self.replaced += [
                (torch.cuda, "is_available", lambda: True),
                (torch.cuda, "get_device_capability", lambda device=None: capability),
                (torch.cuda, "get_device_name", lambda device=None: "pretended GPU"),
            ]
        else:
            self.replaced += [(torch.backends.mps, "is_available", lambda: True)]
        module = torch.get_device_module(kind)
        self.replaced += [  # of another size than the CPU's
            (module, "get_rng_state", lambda device=None: torch.zeros(16, dtype=torch.uint8)),
            (module, "set_rng_state", self.set_rng_state),
        ]
        for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
            if hasattr(torch.optim.Optimizer, name):  # they ask the driver
                self.replaced += [(torch.optim.Optimizer, name, lambda optimizer: None)]

    def __enter__(self):
        self.patches = contextlib.ExitStack()
        for owner, name, new in self.replaced:
            self.patches.enter_context(mock.patch.object(owner, name, new, create=True))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    # What PyTorch does outside of functions of tensors

    @staticmethod
    def set_rng_state(state, device=None):
        if len(state) != 16:
            raise RuntimeError("expected a state of the device's generator")

    def generator_class(self):
        class Generator(torch.Generator):
            def __new__(cls, device="cpu"):
                return (DeviceGenerator if self.means_device(device) else cls.__base__)()

        return Generator

    def autocast(self, autocast):
        def replacement(device_type, *args, **kwargs):
            return autocast("cpu" if device_type == self.kind else device_type, *args, **kwargs)

        return replacement

    def module_to(self, to):
        def replacement(module, *args, **kwargs):
            device, rest, kwargs = self.split_device(args, kwargs)
            if rest or kwargs:
                to(module, *rest, **kwargs)
            if device is not None:
                for part in module.modules():
                    for name, parameter in part.named_parameters(recurse=False):
                        moved = (
                            parameter.detach().to(device).requires_grad_(parameter.requires_grad)
                        )
                        moved._is_param = True  # as nn.Parameter marks what is not of its class
                        part._parameters[name] = moved
                    for name, buffer in part.named_buffers(recurse=False):
                        part._buffers[name] = buffer.to(device)
            return module

        return replacement

    # Functions of tensors

    def means_device(self, device):
        return torch.device(device).type == self.kind

    def split_device(self, args, kwargs):
        """The device asked for by the arguments of to(), or None, and the other arguments."""
        device, rest, kwargs = None, [], dict(kwargs)
        for arg in args:
            if isinstance(arg, str | torch.device):
                device = arg
            elif isinstance(arg, Tensor):
                device = self.device if is_on_device(arg) else "cpu"
                rest.append(arg.dtype)
            else:
                rest.append(arg)
        return kwargs.pop("device", device), rest, kwargs

    def place(self, result, there):
        """Mark every tensor of a result as on the device, if it lies there."""

        def mark(x):
            if not isinstance(x, Tensor) or is_on_device(x):
                return x
            if self.kind == "mps" and x.dtype == torch.float64:
                raise TypeError("MPS has no float64")
            return x.as_subclass(DeviceTensor)

        return tree_map(mark, result) if there else result

    def move(self, source, *args, **kwargs):
        device, rest, kwargs = self.split_device(args, kwargs)
        there = is_on_device(source) if device is None else self.means_device(device)
        moved = on_cpu(source)
        if rest or kwargs:
            moved = moved.to(*rest, **kwargs)
        return self.place(moved if there == is_on_device(source) else moved.clone(), there)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        if func == Tensor.device.__get__:
            return self.device if is_on_device(first) else first.device
        if func is Tensor.to:
            return self.move(*args, **kwargs)
        if func is Tensor.cpu:
            return self.move(first, "cpu")
        if func in TO_PYTHON:
            return func(*tree_map(on_cpu, args), **kwargs)
        if func in {Tensor.numpy, Tensor.__array__} and is_on_device(first):
            raise TypeError(f"a tensor on {self.device} has no numpy(); use cpu() first")

        asked = kwargs.pop("device", None)
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        self.check_devices(func, args, tensors)
        if asked is not None:
            there = self.means_device(asked)
        elif func in {*ACROSS, Tensor.__getitem__}:
            there = is_on_device(first) and func is not torch.tensor
        else:
            there = any(is_on_device(x) for x in tensors)
        for generator in (x for x in leaves if isinstance(x, torch._C.Generator)):
            if is_on_device(generator) != there:
                raise RuntimeError(f"{func.__name__}: generator and tensor on different devices")
        return self.place(func(*args, **kwargs), there)

    def check_devices(self, func, args, tensors):
        """Refuse tensors of both devices; numbers (no axes) on the CPU may meet any other."""
        far = [x for x in tensors if not is_on_device(x) and x.ndim > 0]
        if not far or not any(is_on_device(x) for x in tensors):
            return
        if func in ACROSS or (func is Tensor.__getitem__ and is_on_device(args[0])):
            return
        if func is Tensor.__setitem__ and not any(
            isinstance(i, Tensor) for i in tree_leaves(args[1])
        ):
            return
        shapes = [tuple(x.shape) for x in far]
        raise RuntimeError(f"{func.__name__}: {shapes} on the CPU, others on {self.device}")


if __name__ == "__main__":  # a kernel starts
    os.environ["FLOW_DEVICE"] = os.environ["PRETENDED_DEVICE"]
    PretendedDevice(os.environ["FLOW_DEVICE"]).__enter__()
