"""Registration of an op with torch: schema, fake kernel, implementation, gradient.

From `OpSpec` follow two torch ops, `inpaintrt::<name>` and `inpaintrt::<name>_backward`, each with one implementation for
every device that dispatches at run time. So compiled and exported programs hold one node per op and pick a backend
where they are loaded. The gradient is an op of its own (the reference's VJP, or a kernel) so that it compiles too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from . import registry
from .dispatch import Dispatcher
from .policy import policy
from .spec import Args, OpSpec, Outputs, as_outputs

_library = torch.library.Library("inpaintrt", "DEF")
_implementation = "CompositeExplicitAutograd"
dispatchers: dict[str, Dispatcher] = {}


def register(spec: OpSpec) -> Callable[..., Any]:
    """Define the op and its gradient; return a callable that takes the arguments in schema order.

    In the torch op every argument may be positional (keywords cost a microsecond); the public function decides which
    of them its callers must name.
    """
    registry.add(spec)
    parameters = [p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in spec.signature.parameters.values()]
    # A schema has no defaults for lists, so neither for what stands before one.
    required = max((i + 1 for i, p in enumerate(parameters) if isinstance(p.default, (list, tuple))), default=0)
    parameters[:required] = [p.replace(default=inspect.Parameter.empty) for p in parameters[:required]]
    signature = spec.signature.replace(parameters=parameters)
    tensors = [i for i, p in enumerate(parameters) if p.annotation in (Tensor, Tensor | None)]
    lists = [i for i, p in enumerate(parameters) if p.annotation in (list[Tensor], Sequence[Tensor])]
    returns_tuple = signature.return_annotation is not Tensor
    forward = dispatchers[spec.name] = Dispatcher(spec.name, spec.name, spec.lanes, spec.run_reference, spec.out)

    def result(outs: Outputs) -> Any:
        return outs if returns_tuple else outs[0]

    if tensors:
        key = tensors[0]
        run = _with_signature(signature, lambda args: result(forward(args, args[key])))
    else:
        run = _with_signature(signature, lambda args: result(forward(args, args[lists[0]][0])))
    op = _define(spec.name, signature, run, _with_signature(signature, lambda args: result(spec.out(*args))))
    if spec.differentiable:
        gradient = _gradient(spec, op, _register_backward(spec, signature, tensors), tensors)

        def with_gradient(args: Args) -> Any:
            if torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in tensors):
                return gradient(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        _library.impl(spec.name, _with_signature(signature, with_gradient), "Autograd")
    else:
        _without_gradient(spec.name, signature, op)

    def call(*args: Any) -> Any:
        # Without gradients the Python kernel on the Autograd key would only cost time (5 µs): step past it.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def register_out(spec: OpSpec) -> Callable[..., Any]:
    """Define `<name>_out(out0, …, <arguments>) -> ()`, which writes into its first arguments, of an op that is registered.

    Returns a callable of (outs, *arguments in schema order) that returns the outs. Not differentiable.
    """
    dispatcher, check = dispatchers[spec.name], spec.into
    if check is None:
        raise ValueError(f"{spec.name} has no `into`, which checks the tensors that it writes into")
    returned = spec.signature.return_annotation
    count = 1 if returned is Tensor else len(get_args(returned))
    names = [f"out{i}" for i in range(count)]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=Tensor) for name in names]
    parameters += [p.replace(kind=kind, default=inspect.Parameter.empty) for p in spec.signature.parameters.values()]
    signature = inspect.Signature(parameters, return_annotation=None)
    key = next(i for i, p in enumerate(parameters[count:], count) if p.annotation is Tensor)

    def write(args: Args) -> None:
        check(args[:count], *args[count:])
        dispatcher(args[count:], args[key], args[:count])
        for out in args[:count]:
            if not out.is_inference():
                torch.autograd.graph.increment_version(out)

    run = _with_signature(signature, write)
    fake = _with_signature(signature, lambda args: check(args[:count], *args[count:]))
    op = _define(spec.name + "_out", signature, run, fake, names)
    _without_gradient(spec.name + "_out", signature, op)

    def call(outs: Outputs, *args: Any) -> Outputs:
        if len(outs) != count:
            raise ValueError(f"out has {len(outs)} tensors; accepted: {count}")
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            op(*outs, *args)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                op(*outs, *args)
        return outs

    return call


def _without_gradient(name: str, signature: inspect.Signature, op: Callable[..., Any]) -> None:
    """Outputs that require no gradient, whatever the inputs do: backpropagation says so instead of missing a part."""

    def detached(args: Args) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, _with_signature(signature, detached), "Autograd")


def _define(
    name: str,
    signature: inspect.Signature,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    mutated: Sequence[str] = (),
) -> Callable[..., Any]:
    schema = torch.library.infer_schema(_with_signature(signature, lambda args: None), mutates_args=mutated)
    _library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(name, run, _implementation)
    torch.library.register_fake(f"inpaintrt::{name}", fake, lib=_library)
    return getattr(torch.ops.inpaintrt, name).default  # type: ignore[no-any-return]


def _gradient(
    spec: OpSpec, op: Callable[..., Any], backward_op: Callable[..., Any], tensors: list[int]
) -> Callable[..., Any]:
    """The op as a differentiable function of its arguments in schema order."""

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.policy = policy.get()  # context variables do not reach autograd's threads
            ctx.others = [None if isinstance(a, Tensor) else a for a in args]
            ctx.where = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
            ctx.save_for_backward(*(args[i] for i in ctx.where))
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            args = list(ctx.others)
            for i, tensor in zip(ctx.where, ctx.saved_tensors, strict=True):
                args[i] = tensor
            needs = [ctx.needs_input_grad[i] for i in tensors]
            if torch.is_grad_enabled():  # create_graph=True: what is differentiated again is the reference's gradient
                leaves = [args[i] for i, needed in zip(tensors, needs, strict=True) if needed]
                outputs, grads = _differentiable(as_outputs(spec.run_reference(*args)), grads)
                found = iter(torch.autograd.grad(outputs, leaves, grads, create_graph=True, materialize_grads=True))
            else:
                token = policy.set(ctx.policy)
                try:
                    found = iter(backward_op(list(grads), *args, needs))
                finally:
                    policy.reset(token)
            full: list[Tensor | None] = [None] * len(args)
            for i, needed in zip(tensors, needs, strict=True):
                if needed:
                    full[i] = next(found)
            return tuple(full)

    return Gradient.apply  # type: ignore[no-any-return]


def _register_backward(spec: OpSpec, signature: inspect.Signature, tensors: list[int]) -> Callable[..., Any]:
    """`<name>_backward(grads, <arguments>, needs) -> Tensor[]`: the gradients of those tensor arguments that need one."""
    name = spec.name + "_backward"
    plain = [p.replace(default=inspect.Parameter.empty) for p in signature.parameters.values()]
    grads = inspect.Parameter("grads", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=list[Tensor])
    needs = inspect.Parameter("needs", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=list[bool])
    full = inspect.Signature([grads, *plain, needs], return_annotation=list[Tensor])

    def wanted(args: Args) -> list[int]:
        return [i for i, needed in zip(tensors, args[-1], strict=True) if needed]

    def out(*args: Any) -> Outputs:
        inputs = args[1:-1]
        return tuple(torch.empty_like(inputs[i]) for i in wanted(args))

    def reference(*args: Any) -> Outputs:
        return _vjp(spec, args[1:-1], args[0], wanted(args))

    dispatcher = dispatchers[name] = Dispatcher(name, spec.name, spec.backward_lanes, reference, out)
    run = _with_signature(full, lambda args: list(dispatcher(args, args[0][0])))
    return _define(name, full, run, _with_signature(full, lambda args: list(out(*args))))


def _vjp(spec: OpSpec, args: Args, grads: list[Tensor], wanted: list[int]) -> Outputs:
    """Differentiate the reference inside an op's implementation.

    Autograd is off by dispatch key there, not only by mode, so the key has to be let back in; the guard is private to
    torch (checkpointing uses the same one) and this is the only place that touches it.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        leaves = list(args)
        for i in wanted:
            leaves[i] = args[i].detach().requires_grad_()
        outputs, given = _differentiable(as_outputs(spec.run_reference(*leaves)), grads)
        return torch.autograd.grad(outputs, [leaves[i] for i in wanted], given, materialize_grads=True)


def _differentiable(outputs: Outputs, grads: Sequence[Tensor]) -> tuple[Outputs, tuple[Tensor, ...]]:
    """The outputs that depend on what is differentiated (a mask may not), with their gradients."""
    kept = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    return tuple(out for out, _ in kept), tuple(grad for _, grad in kept)


def _with_signature(signature: inspect.Signature, body: Callable[[Args], Any]) -> Callable[..., Any]:
    """`body`, which takes the arguments as one tuple, behind a real signature.

    torch leaves out arguments that have their default value, and binding them through `inspect` costs microseconds; a
    generated function lets the interpreter do it.
    """
    scope: dict[str, Any] = {"body": body}
    parts, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        text = parameter.name
        if parameter.default is not inspect.Parameter.empty:
            scope[f"default_{parameter.name}"] = parameter.default
            text += f"=default_{parameter.name}"
        parts.append(text)
    packed = "".join(f"{name}, " for name in signature.parameters)
    exec(f"def call({', '.join(parts)}):\n    return body(({packed}))", scope)
    function = scope["call"]
    function.__signature__ = signature
    function.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()} | {
        "return": signature.return_annotation
    }
    return function  # type: ignore[no-any-return]
