"""The one table of decoding options: the command line, the service and the bounds follow it."""

from capgen_utils.apps.cli.main import make_parser, subparsers
from capgen_utils.apps.serve.schemas import Options
from capgen_utils.common.files import from_dict
from capgen_utils.config import DecodingConfig
from capgen_utils.decoding.options import OPTIONS


def test_the_command_line_offers_every_option_with_its_help() -> None:
    for command in ("caption", "evaluate"):
        actions = {action.dest: action for action in subparsers(make_parser())[command]._actions}
        for name, (kind, option) in OPTIONS.items():
            assert actions[name].type is kind and (actions[name].help or "").startswith(option.help)
        assert set(actions) > set(OPTIONS) | {"help", "rerank", "scorer"}


def test_the_service_offers_every_option_within_the_bounds() -> None:
    schema = Options.model_json_schema()["properties"]
    for name, (_, option) in OPTIONS.items():
        kind = schema[name]["anyOf"][0]
        kind = kind.get("items", kind)
        assert kind["minimum"] >= option.low and kind["maximum"] <= option.high, name
        assert schema[name]["description"] == option.help
    assert set(schema) == set(OPTIONS) | {"model", "rerank", "attention"}


def test_stored_options_are_read_back() -> None:
    plain, sampled = DecodingConfig(beam=3), DecodingConfig(temperatures=(0.0, 0.7))
    assert "temperatures" not in plain.to_json(), "bundles and results keep their format"
    for config in (plain, sampled):
        assert from_dict(DecodingConfig, config.to_json()) == config
    as_list = sampled.to_json() | {"temperatures": [0.0, 0.7]}
    assert from_dict(DecodingConfig, as_list) == sampled, "as JSON holds it"
