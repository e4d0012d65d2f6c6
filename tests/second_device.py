"""A GPU, played on the CPU: its tensors are CPU tensors whose memory is noted.

with second_device() as gpu:      # "cuda" is a device now
    ...                           # an operation on tensors of both devices is an error
    gpu.may_wait = False          # from here on a wait for the GPU is one, too
"""

import contextlib
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)  # take tensors of two devices
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)  # for a value or a size
WAITS_TO_MAKE = ("tensor", "as_tensor")  # Python's numbers to the GPU
GET_DEVICE = torch.Tensor.device.__get__
GET_IS_CUDA = torch.Tensor.is_cuda.__get__
GROUP = torch._C._group_tensors_by_device_and_dtype


def tensors_in(values) -> list:
    """All tensors in nested lists, tuples and dicts."""
    found = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | dict):
            found += tensors_in(value)
    return found


class Gpu(TorchDispatchMode):
    """Knows which memory is the GPU's, and looks at every operation, those of the backward pass and optimizers, too."""

    def __init__(self):
        super().__init__()
        self.may_wait = True
        self.operations = 0  # on the GPU
        self.memory = {}  # address -> the storage that was there
        self.to_device = None  # where all results of the running call go
        self.around = ()  # inputs of the running call: what it makes of nothing lies where they do

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # torch's wrapper around __torch_dispatch__ would take as long as the method

    def device(self, tensor):
        storage = self.memory.get(tensor.untyped_storage().data_ptr())
        return CPU if storage is None or storage.expired() else CUDA

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self.memory[storage.data_ptr()] = StorageWeakRef(storage)

    def wait(self, what):
        if not self.may_wait:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def make(self, device, function, *args, **kwargs):
        """Call it; what it returns lies on the device."""
        self.to_device = device
        try:
            return function(*args, **kwargs)
        finally:
            self.to_device = None

    def grouped(self, *inputs):
        """Groups of tensors by device and type, as torch's gradient clipping asks for them."""
        groups = GROUP(*inputs)
        return {(self.device(group[0][0][0]), dtype): group for (_, dtype), group in groups.items()}

    def call(self, function, *args, **kwargs):
        """Call it; its results lie where its inputs do."""
        outer, self.around = self.around, (args, *kwargs.values())
        try:
            return function(*args, **kwargs)
        finally:
            self.around = outer

    def move(self, tensor, *target, **options):
        """`tensor.to(...)`"""
        if target and isinstance(target[0], torch.Tensor):
            device = self.device(target[0])
            dtype = target[0].dtype
        else:
            device, dtype, _, _ = torch._C._nn._parse_to(*target, **options)
            device = device or self.device(tensor)
        moved = self.call(torch.Tensor.to, tensor, dtype or tensor.dtype)
        if device.type == self.device(tensor).type:
            return moved
        self.wait("a copy between devices")
        return self.make(CUDA if device.type == "cuda" else CPU, torch.clone, moved)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors_in([*args, *kwargs.values()])
        devices = set(map(self.device, inputs))
        if self.to_device:
            on_gpu = self.to_device == CUDA
        else:
            # Single numbers may lie on the CPU
            sized = [part for part in inputs if part.dim() > 0 and part.numel() > 0] if len(devices) > 1 else []
            if len(set(map(self.device, sized))) > 1 and func not in MOVES:
                places = ", ".join(f"{self.device(part).type} {tuple(part.shape)}" for part in inputs)
                raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {places}")
            on_gpu = CUDA in (devices if inputs else map(self.device, tensors_in(self.around)))
            masked = func is aten.index.Tensor and any(part.dtype == torch.bool for part in inputs[1:])
            if CUDA in devices and (func in WAITS or masked or len(devices) > 1 and func in MOVES):
                self.wait(func)
        result = func(*args, **kwargs)
        self.operations += on_gpu
        if on_gpu and func is not aten.copy_.default:
            given = {part.untyped_storage().data_ptr() for part in inputs}
            for part in tensors_in([result]):
                if self.to_device or part.untyped_storage().data_ptr() not in given:
                    self.keep(part)
        return result


class Python(TorchFunctionMode):
    """What Python sees of it: devices, `.to`, `device=...`, and no NumPy array of the GPU's memory."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        gpu = self.gpu
        name = getattr(func, "__name__", "")
        if func == GET_DEVICE:
            return gpu.device(*args)
        if func == GET_IS_CUDA:
            return gpu.device(*args) == CUDA
        if func is torch.Tensor.to:
            return gpu.move(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return gpu.move(*args, "cpu")
        if name in ("numpy", "__array__") and gpu.device(args[0]) == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "__deepcopy__":
            return gpu.make(gpu.device(args[0]), func, *args)
        if func is torch.nn.functional.one_hot:  # looks at its input only on a CPU
            with mock.patch.object(gpu, "may_wait", True):
                return gpu.call(func, *args, **kwargs)
        device = kwargs.pop("device", None)
        if device is None:
            return gpu.call(func, *args, **kwargs)
        device = CUDA if torch.device(device).type == "cuda" else CPU
        if device == CUDA and name in WAITS_TO_MAKE:
            gpu.wait(name)
        return gpu.make(device, func, *args, **kwargs)


@contextlib.contextmanager
def second_device():
    """In it "cuda" is a device. What would ask the driver is answered here, as torch may be built with CUDA."""
    gpu = Gpu()
    fork_rng = torch.random.fork_rng
    with (
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
        mock.patch("torch.backends.cudnn.is_acceptable", lambda tensor: False),
        mock.patch("torch.random.fork_rng", lambda devices=(): fork_rng([])),
        mock.patch("torch._C._group_tensors_by_device_and_dtype", gpu.grouped),
        Python(gpu),
        gpu,
    ):
        yield gpu
