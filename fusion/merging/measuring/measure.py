from fusion.config import UserError, raise_problems
from fusion.merging.evidence import Evidence
from fusion.merging.measuring.study import Study
from fusion.merging.method import load_method
from fusion.merging.parameters import check_parameters, options_of


def measure(method: str, study: Study, **parameters: object) -> Evidence:
    """What a merge by `method` with these parameters needs to know of the study's models and dialogues.

    Everything measured is kept in the study's cache, so asking again costs nothing.

    Raises:
        UserError: the method needs no evidence, a parameter is wrong, or the models cannot read the dialogues.
    """
    loaded = load_method(method)
    raise_problems(check_parameters(loaded, parameters, num_targets=len(study.targets)))
    if loaded.evidence is None:
        raise UserError(f"merge method '{loaded.name}' needs no evidence: merge without")
    options = options_of(loaded)
    return loaded.evidence(study, **{name: value for name, value in parameters.items() if options[name].measures})
