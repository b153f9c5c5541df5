from __future__ import annotations

from pathlib import Path

import click

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import add_plan, plan_in
from ldm_export.cli.options import bundle_argument, console, json_option, parity_line, print_json, stages, was_given
from ldm_export.errors import InputError
from ldm_export.plan import SAMPLERS, Forecast, forecast_of


def _forecast(calls: int | None, at: str | None, order: int) -> Forecast | None:
    if at is None:
        if calls is None and was_given("order"):
            raise InputError("--order is of the forecast between --calls, which was not given. Give both, or neither.")
        return None if calls is None else Forecast(calls, order)
    words = at.split(",")
    if not all(word.isascii() and word.isdigit() and len(word) < 6 for word in words):
        raise InputError(f"--at {at[:40]} is no list of calls; it is ascending numbers from 0, such as 0,1,2,5,10.")
    if calls not in (None, len(words)):
        raise InputError(f"--calls {calls} was given with --at of {len(words)} calls. Leave --calls out.")
    return Forecast(len(words), order, tuple(map(int, words)))


@click.command()
@bundle_argument
@click.option("--sampler", required=True, help=f"One of {', '.join(SAMPLERS)}.")
@click.option("--steps", type=int, required=True, help="Denoising steps.")
@click.option("--calls", type=int, default=None, help="Network calls; outputs of the other steps are forecast.")
@click.option(
    "--at", metavar="N,N,...", default=None, help="Which calls are made, from 0 on; spread over the steps by default."
)
@click.option("--order", type=int, default=1, show_default=True, help="Degree of the forecast, 0 to 3.")
@click.option("--eta", default=0.0, show_default=True, help="DDIM's share of DDPM's noise, in [0, 1].")
@click.option("--loop", is_flag=True, help="Also add the whole sampling loop as one ONNX graph.")
@json_option
def command(
    bundle: Path,
    sampler: str,
    steps: int,
    calls: int | None,
    at: str | None,
    order: int,
    eta: float,
    loop: bool,
    as_json: bool,
) -> None:
    """Compile a sampler into a plan and add its file to BUNDLE, where it is what is drawn with.

    The runtimes compile what has no file when they draw; a file is for --eta, and to keep a plan as it is now. Of a
    model whose noise levels are by the size of the picture, it is used at the model's own size alone.

    With --calls or --at, fewer network calls than steps are made, and the outputs between them are extrapolated: the
    plan is of SAMPLER-callsN, in the same table and for every runtime. `generate --calls N` takes this file, if it is
    there.

    With --loop, loops/SAMPLER-STEPS.onnx goes from token ids and noise to pictures by this plan, in any language that
    has ONNX Runtime. It is compared with the runtime before it is added; exit code 1 if it differs.
    """
    opened, forecast = Bundle.open(bundle), _forecast(calls, at, order)
    path = f"plans/{sampler}-{steps}.json"
    if path in opened.manifest.files and forecast_of(sampler)[0] not in SAMPLERS and not (eta or forecast):
        plan = plan_in(opened, path)  # that nothing compiles, such as a fitted one
    else:
        opened, plan = add_plan(opened, sampler, steps, eta=eta, forecast=forecast)
    document = {"plan": f"plans/{plan.file_name}", "rows": len(plan.rows)}
    if plan.tokens:
        document["size"] = f"{opened.manifest.model['height']}x{opened.manifest.model['width']}"
    records = []
    if loop:
        from ldm_export.verify.loops import add_loop, records_of

        name = plan.file_name.removesuffix(".json")
        with stages("loop") as progress:
            records = records_of(add_loop(opened, name, progress), [name])
        document |= {"loop": f"loops/{name}.onnx", "parity": records}
    if as_json:
        print_json(document)
        return
    of_one_size = f", for pictures of {document['size']}" if plan.tokens else ""
    console.print(f"{document['plan']}: {len(plan.rows)} network calls{of_one_size}")
    for record in records:
        console.print(parity_line(record))
