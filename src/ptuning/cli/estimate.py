"""The command that says what a training run will take. ``show_forecast`` prints for it."""

from __future__ import annotations

from ptuning.cli import show_estimate, terminal
from ptuning.cli.options import (
    SETTINGS,
    AboutOption,
    BackboneLrOption,
    BackboneOption,
    BatchSizeOption,
    CacheMemoryOption,
    CalibrateOption,
    DeviceOption,
    DevOption,
    DtypeOption,
    EncoderOption,
    EpochsOption,
    FieldOption,
    JsonOption,
    KeepOption,
    LabelsOption,
    LrOption,
    ManualOption,
    PatternOption,
    SeedOption,
    SetOption,
    StartsOption,
    TaskOption,
    TemplateOption,
    TrainOption,
    TuneOption,
    config_of,
    load,
    task_of,
    template_of,
    training_parts,
    tune_options,
)


def estimate(
    data: TrainOption,
    template: TemplateOption = None,
    manual: ManualOption = None,
    about: AboutOption = None,
    task: TaskOption = None,
    pattern: PatternOption = None,
    dev: DevOption = None,
    backbone: BackboneOption = None,
    encoder: EncoderOption = SETTINGS.encoder,
    epochs: EpochsOption = SETTINGS.epochs,
    batch_size: BatchSizeOption = SETTINGS.batch_size,
    lr: LrOption = SETTINGS.lr,
    tune: TuneOption = SETTINGS.tune,
    backbone_lr: BackboneLrOption = None,
    keep: KeepOption = SETTINGS.keep,
    starts: StartsOption = SETTINGS.starts,
    cache_memory: CacheMemoryOption = SETTINGS.cache_memory,
    seed: SeedOption = SETTINGS.seed,
    labels: LabelsOption = None,
    calibrate: CalibrateOption = None,
    set_: SetOption = None,
    field: FieldOption = None,
    as_json: JsonOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Say what "ptuning train" with the same options will take: memory and time, from a few of its steps.

    Example: ptuning estimate --data capitals:train --dev capitals:dev --manual "The capital of [X] is [Y]"
    """
    chosen = {"encoder": encoder, "epochs": epochs, "batch_size": batch_size, "lr": lr, "starts": starts, "seed": seed}
    chosen |= {"cache_memory": cache_memory}
    config = config_of(set_, **chosen, **tune_options(tune, backbone_lr, keep))
    asked = task_of(task)
    parsed = template_of(asked, template, manual, about, pattern)
    rows, dev_rows = training_parts(data, dev, field, asked)
    loaded = load(backbone, dtype=dtype, device=device)
    with terminal.bar() as report:
        from ptuning.training.estimate import estimate as forecast

        found = forecast(
            parsed,
            rows,
            backbone=loaded,
            dev=dev_rows,
            config=config,
            labels=labels,
            task=asked,
            calibrate=calibrate,
            report=report,
        )
    show_estimate.forecast(found, as_json=as_json)
