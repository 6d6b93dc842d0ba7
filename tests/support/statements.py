"""Statements of a forward that make values: layers, norms, activations, merges and views."""

from support.grammar import Writer

# --- layers --------------------------------------------------------------------------------------


def conv(w: Writer) -> None:
    options = w.choose(
        *("3, padding=1", "1", "3, padding=1, groups=4", "3, padding=1, bias=False"),
        *("3, padding='same'", "3, padding=1, padding_mode='circular'", "3, padding=2, dilation=2"),
    )
    call = w.module(f"nn.Conv2d(4, 4, {options})")
    w.convs.append(call)
    value = w.pick("map")
    w.make(f"{call}({value.name})", value)


def resize(w: Writer) -> None:
    value = w.pick("map")
    if value.size == 6:
        layer = w.choose(
            "nn.Conv2d(4, 4, 3, stride=2, padding=1)", "nn.MaxPool2d(2)", "nn.AvgPool2d(2)"
        )
    else:
        layer = w.choose("nn.ConvTranspose2d(4, 4, 2, stride=2)", "nn.Upsample(scale_factor=2)")
    w.make(f"{w.module(layer)}({value.name})", value, size=9 - value.size)


def linear(w: Writer) -> None:
    value = w.pick("tokens", "flat")
    if value.kind == "map":
        value = w.make(f"{value.name}.mean((2, 3))", value, "flat", 1)
    if w.linears and w.rarely(4):
        call = w.choose(*w.linears)
    else:
        call = w.module(f"nn.Linear(4, 4, bias={w.choose(True, False)})")
        w.linears.append(call)
    w.make(f"{call}({value.name})", value)


def functional_layer(w: Writer) -> None:
    value = w.pick()
    if value.kind == "map":
        k = w.choose(1, 3)
        weight = w.parameter(4, 4, k, k)
        if w.rarely(6):
            weight = f"{w.module('Centre()')}({weight})"
        bias = w.choose("None", "None", w.parameter(4))
        w.make(f"F.conv2d({value.name}, {weight}, {bias}, padding={k // 2})", value)
    else:
        w.make(f"F.linear({value.name}, {w.parameter(4, 4)})", value)


def again(w: Writer) -> None:
    """A module called a second time, by its own name or another."""
    value, call = w.pick("map"), w.choose(*w.convs)
    if w.rarely(3):
        name = w.attribute("other")
        w.init.append(f"self.{name} = {call}")
        call = f"self.{name}"
    w.make(f"{call}({value.name})", value)


def tied(w: Writer) -> None:
    value, owner = w.pick("map"), w.convs[0]
    name = w.attribute("tied")
    w.init.append(f"self.{name} = nn.Conv2d(4, 4, 3, padding=1)")
    w.init.append(f"self.{name}.weight = {owner}.weight")
    w.make(f"self.{name}({value.name})", value)


def stack(w: Writer) -> None:
    """Several modules in a container, called as one or in a loop."""
    value = w.pick("map")
    act = w.choose("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.Tanh()", "nn.Dropout2d(0.3)")
    layers = f"nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), {act}"
    if w.rarely(2):
        call = w.module(w.choose(f"nn.Sequential({layers})", f"Residual(nn.Sequential({layers}))"))
        w.make(f"{call}({value.name})", value)
        return
    name = w.attribute("stack")
    w.init.append(f"self.{name} = nn.ModuleList([{layers}, nn.Conv2d(4, 4, 1)])")
    result = w.make(value.name, value)
    with w.indented(f"for one in self.{name}:"):
        w.emit(f"{result.name} = one({result.name})")


def attention(w: Writer) -> None:
    value = w.pick("tokens")
    if value.kind == "map":
        return tokens(w)
    call = w.module("nn.MultiheadAttention(4, 2, batch_first=True)")
    n = value.name
    w.make(f"{call}({n}, {n}, {n}, need_weights={w.choose(True, False)})[0]", value)


def freeze(w: Writer) -> None:
    w.init.append(f"{w.choose(*w.convs, *w.linears)}.weight.requires_grad_(False)")


# --- norms, activations, drops -------------------------------------------------------------------


def norm(w: Writer) -> None:
    value = w.pick("map")
    layer = w.choose(
        *("nn.BatchNorm2d(4)", "nn.BatchNorm2d(4)", "nn.BatchNorm2d(4, affine=False)"),
        *("nn.BatchNorm2d(4, momentum=None)", "nn.BatchNorm2d(4, track_running_stats=False)"),
        *("nn.InstanceNorm2d(4)", "nn.InstanceNorm2d(4, affine=True, track_running_stats=True)"),
        *("nn.GroupNorm(2, 4)", "NormRelu(4)"),
    )
    w.make(f"{w.module(layer)}({value.name})", value)


def token_norm(w: Writer) -> None:
    value = w.pick("tokens", "flat")
    if value.kind == "map":
        return norm(w)
    form = w.choose(f"{w.module('nn.LayerNorm(4)')}({{}})", "F.layer_norm({}, (4,))")
    w.make(form.format(value.name), value)


def functional_norm(w: Writer) -> None:
    value = w.pick("map")
    mean, var = w.buffer("torch.zeros(4)"), w.buffer("torch.ones(4)")
    form = w.choose(
        "F.batch_norm({}, {}, {}, training=self.training)",
        "F.batch_norm({}, {}, {}, None, None, self.training, 0.2)",
        "F.batch_norm({}, None, None, training=True)",
        "F.instance_norm({}, {}, {}, use_input_stats=self.training)",
        "F.instance_norm({})",
        "F.group_norm({}, 2)",
    )
    w.make(form.format(value.name, mean, var), value)


def activation(w: Writer) -> None:
    value = w.pick()
    form = w.choose(
        *("F.relu({})", "torch.relu({})", "torch.tanh({})", "F.relu({}, inplace=True)"),
        *("F.leaky_relu({}, 0.1, inplace=True)", "{}.sigmoid()", "torch.relu_({})", "F.gelu({})"),
        *("F.silu({}, inplace=True)", "{}.clamp(min=-1)", "{} * torch.sigmoid({})"),
    )
    w.make(form.replace("{}", value.name), value)


def activation_module(w: Writer) -> None:
    value = w.pick()
    layer = w.choose("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.Hardtanh(inplace=True)", "nn.ELU()")
    w.make(f"{w.module(layer)}({value.name})", value)


def drop(w: Writer) -> None:
    value = w.pick()
    form = w.choose(
        *(
            "F.dropout({}, 0.3, self.training)",
            "F.dropout({}, training=False)",
            "F.dropout({}, 0.2)",
        ),
        *(f"{w.module('nn.Dropout(0.3)')}({{}})", f"{w.module('nn.Dropout(0.0)')}({{}})"),
        *("F.dropout({}, 0.3, self.training, inplace=True)", "F.dropout({}, 0.0, self.training)"),
    )
    w.make(form.format(value.name), value)


# --- merges and views ----------------------------------------------------------------------------


def merge(w: Writer) -> None:
    a = w.pick()
    b = w.pick(like=a)
    if (a.kind, a.size) != (b.kind, b.size):
        return
    if a.kind == "map" and w.rarely(4):
        call = w.module("nn.Conv2d(8, 4, 1)")
        w.make(f"{call}(torch.cat([{a.name}, {b.name}], 1))", a)
        return
    form = w.choose("{} + {}", "{} + {}", "torch.add({}, {})", "{} * {}.sigmoid()", "{} - 0.5 * {}")
    w.make(form.format(a.name, b.name), a)


def broadcast(w: Writer) -> None:
    """A squeeze over all positions, added to or multiplied with the map."""
    value = w.pick("map")
    call = w.module("nn.Conv2d(4, 4, 1)")
    form = w.choose(
        "{} + {}({}.mean((2, 3), keepdim=True))", "{} * {}(F.adaptive_avg_pool2d({}, 1))"
    )
    w.make(form.format(value.name, call, value.name), value)


def view(w: Writer) -> None:
    """Another name for a value's memory, of the same shape."""
    value = w.pick()
    form = w.choose(
        *("{}.view_as({})", "{}.contiguous()", "{}.to({}.dtype)", "{}[:]", "{}.reshape({}.shape)"),
        *("{}.unsqueeze(0).squeeze(0)", "{}.transpose(-1, -2).transpose(-2, -1)", "{}.data"),
        *("{}.detach()", "{}.view({}.size())", "{}.narrow(1, 0, {}.shape[1])", "{}.clone()"),
        *("{}.unflatten(0, (-1, 1)).flatten(0, 1)", "{}.chunk(1, 1)[0]", "{}.expand_as({})"),
        f"{w.module('nn.Identity()')}({{}})",
    )
    w.make(form.replace("{}", value.name), value)


def tokens(w: Writer) -> None:
    value = w.pick("map", "tokens")
    if value.kind == "map":
        w.make(f"{value.name}.flatten(2).transpose(1, 2)", value, "tokens", value.size)
    else:
        n, s = value.name, value.size
        form = w.choose("{}.transpose(1, 2).reshape(-1, 4, {}, {})", "{}.mT.unflatten(2, ({}, {}))")
        w.make(form.format(n, s, s), value, "map", s)


def pool(w: Writer) -> None:
    value = w.pick("map")
    w.make(
        w.choose("{}.mean((2, 3))", "{}.amax((2, 3))", "{}[:, :, 1, 1]").format(value.name),
        value,
        "flat",
        1,
    )


def part(w: Writer) -> None:
    """A view of some of a value, to be written through later."""
    value = w.pick("map")
    form = w.choose("{}[:, :2]", "{}.chunk(2, 1)[0]", "{}.narrow(1, 1, 2)", "{}.split(2, dim=1)[1]")
    name = w.fresh("part")
    w.emit(f"{name} = {form.format(value.name)}")
    w.parts.append((value, name))
