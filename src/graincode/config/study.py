"""Studies: sweeps by Optuna with a database, which the same command goes on with."""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack
from pathlib import Path

from filelock import Timeout
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from graincode.config.schema import identity_rules
from graincode.config.typed import parse
from graincode.core.errors import GraincodeError, brief
from graincode.files import short_hash
from graincode.locks import locked
from graincode.runs.identity import identity_of


def is_study(config: DictConfig) -> bool:
    """Whether a sweep is one by Optuna that keeps what it finds."""
    sweeper = config.hydra.sweeper
    return sweeper.get("_target_", "").endswith(".OptunaSweeper") and OmegaConf.select(sweeper, "storage") is not None


def go_on(config: DictConfig) -> ExitStack:
    """Leave to Hydra's sweeper what is left of a study: members that were stopped come first, with what they tried.
    Gives what holds the study until it is closed.

    A study without a name gets one from all settings that change results, but for those that are searched.

    Raises:
        GraincodeError: the database cannot be used, another process works in the study, or it has other settings.
    """
    sweeper, settings = config.hydra.sweeper, _settings(config)
    with read_write(config.hydra), open_dict(config.hydra):
        if sweeper.study_name is None:
            search = config.hydra.runtime.choices.get("search") or config.hydra.job.name
            sweeper.study_name = f"{search}-{settings}"
            config.hydra.overrides.hydra.append(f"hydra.sweeper.study_name={sweeper.study_name}")  # for the members
    folder = Path(config.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / "study.lock", 0))
        except Timeout:
            raise GraincodeError(f"another process works in the study {folder}: wait for it, or give another name by "
                                 "hydra.sweeper.study_name") from None  # fmt: skip
        try:
            with warnings.catch_warnings(), read_write(config.hydra):
                warnings.simplefilter("ignore")  # what is called experimental
                done, total = _prepare(sweeper, settings)
        except GraincodeError:
            raise
        except Exception as error:  # of Optuna and of databases, whose errors are many
            line = f"hydra.sweeper.storage={sweeper.storage}: expected a database that can be used"
            raise GraincodeError(f"{line}, such as sqlite:///a.db ({brief(error)})") from error
        if done:
            print(f"study {sweeper.study_name}: {done} of {total} members are done")
        return held.pop_all()


def _prepare(sweeper: DictConfig, settings: str) -> tuple[int, int]:
    """Make a study ready to go on; how many of its members are done, and how many there are to be."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # which logs what it imports
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = sweeper.direction if OmegaConf.is_list(sweeper.direction) else [sweeper.direction]
    # Optuna 2 does not commit the first thing that it writes, which SQLAlchemy 2 then takes back
    storage = optuna.storages.RDBStorage(sweeper.storage, {"isolation_level": "AUTOCOMMIT"})
    study = optuna.create_study(
        study_name=sweeper.study_name, storage=storage, load_if_exists=True,
        directions=[getattr(one, "name", one) for one in directions],
    )  # fmt: skip
    if study.user_attrs.setdefault("settings", settings) != settings:
        line = f"hydra.sweeper.study_name={sweeper.study_name}: this study has other settings"
        raise GraincodeError(f"{line}; give another name, or those settings")
    study.set_user_attr("settings", settings)
    trials = study.get_trials(deepcopy=False)
    stopped = [trial for trial in trials if trial.state == TrialState.RUNNING]
    for trial in stopped:
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)
    again = study.user_attrs.get("stopped", []) + [trial.number for trial in stopped]
    study.set_user_attr("stopped", again)
    ended = {trial.number for trial in trials if trial.state.is_finished()}
    done, total = len(ended - {*again}), sweeper.n_trials
    sweeper.n_trials = max(total - done, 0)
    if OmegaConf.select(sweeper, "sampler.seed") is not None:
        sweeper.sampler.seed += len(trials)  # else it would propose again what it proposed at first
    return done, total


def _settings(config: DictConfig) -> str:
    """A hash of what is fixed in a study, and of what is searched."""
    plain = OmegaConf.to_container(config, resolve=False)
    searched = plain.pop("hydra")["sweeper"].get("params")
    overrides = {typed.partition("=")[0]: typed for typed in config.hydra.overrides.task}
    swept = sorted(typed for typed in overrides.values() if (read := parse(typed)) and read.is_sweep_override())
    left_out = identity_rules().left_out
    kept = [pattern for pattern in left_out if not pattern.endswith(("_path", "init_from"))]
    return short_hash([identity_of(plain, kept), searched, swept])
