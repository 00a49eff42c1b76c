"""A model family's messages as token ids, and back: by the package `renderers`, held to what is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import Field, ValidationError
from transformers import PreTrainedTokenizerBase

from megatron_rapo.config import Data, RunConfig
from megatron_rapo.config.explain import explain_value
from megatron_rapo.config.templates import Templated
from megatron_rapo.data.templates import encode_chat
from megatron_rapo.environments.neutral import Neutral
from megatron_rapo.errors import RapoError
from megatron_rapo.section import Section
from megatron_rapo.user_code import ADDRESS, load

Message = Mapping[str, Any]

_OPTION = "environment.options.renderer"
TEMPLATE = "template"
_PROBE = "What is 2 + 3?"
_NO_RENDERER = (
    "auto",
    "default",
    "custom",
)  # names of `renderers` that do not continue exactly, or not by name


class RenderingOptions(Section):
    """How messages become tokens."""

    renderer: str = Field(
        "auto", description="`auto`, a family's name, `template`, `plain`, or `module:Class`."
    )
    renderer_options: dict[str, Any] = Field({}, description="Options of it.")


class Rendering:
    """Messages as token ids.

    Attributes:
        stop: tokens that end the policy's turn.
    """

    def __init__(
        self,
        renderer: Any,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Mapping[str, Any]] = (),
        name: str = "plain",
    ) -> None:
        """
        Args:
            renderer: as `renderers.base.Renderer` has it.
            tokenizer: the policy's.
            tools: JSON schemas of what the policy may call.
            name: of the renderer, for errors.
        """
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._tools = list(tools)
        self._name = name
        self._neutral = Neutral(tokenizer)
        self.stop = tuple(renderer.get_stop_token_ids())

    def parse(self, prompt: Sequence[int], sampled: Sequence[int]) -> Any:
        """What the policy said, as `renderers.base.ParsedResponse`."""
        try:
            return self._renderer.parse_response(list(sampled), tools=self._tools, prompt_ids=list(prompt))
        except (RecursionError, ValueError):  # of JSON that is nested too deep, or has a number too long
            from renderers.base import ParsedResponse, ParsedToolCall, ToolCallParseStatus

            text = self._tokenizer.decode(list(sampled))
            bad = ParsedToolCall(raw=text, status=ToolCallParseStatus.MALFORMED_STRUCTURE)
            return ParsedResponse(content=text, tool_calls=[bad])

    def continuation(
        self, prompt: Sequence[int], sampled: Sequence[int], messages: Sequence[Message]
    ) -> list[int] | None:
        """What is given behind the sampled tokens, up to where the policy's next turn begins.

        Control tokens in the messages' texts, and in what the policy called a tool, are broken up.

        Returns:
            None where the family's template goes on only by writing otherwise what was there before.
        """
        neutral = [
            {part: text if part == "role" else self._neutral(text) for part, text in message.items()}
            for message in messages
        ]
        bridged = self._renderer.bridge_to_next_turn(list(prompt), list(sampled), neutral, tools=self._tools)
        before = [*prompt, *sampled]
        if bridged is None or list(bridged.token_ids[: len(before)]) != before:
            return None
        return list(bridged.token_ids[len(before) :])

    def check_continues(self, message: Message) -> None:
        """That a turn of the policy, with a message like this behind it, is continued as it is.

        Raises:
            RapoError: it is not.
        """
        asked = [{"role": "user", "content": _PROBE}]
        prompt = self._renderer.render_ids(asked, tools=self._tools, add_generation_prompt=True)
        said = [*self._tokenizer.encode("It is 5.", add_special_tokens=False), *self.stop[:1]]
        if self.continuation(prompt, said, [message]) is not None:
            return
        config = getattr(self._renderer, "config", None)
        remedy = (
            'renderer_options = { thinking_retention = "all" } is exact: all reasoning stays in the context'
            if hasattr(config, "thinking_retention") and self._name != "default"
            else f'choose one of {_names()}, "template" where the model\'s own writes turn behind turn, or '
            'plain text: data.template = "plain" and renderer = "plain"'
        )
        raise RapoError(
            f'{_OPTION} = "{self._name}": the template rewrites what the policy said once a message of '
            f"{message['role']} follows, so that it could not be trained on as it was sampled; {remedy}"
        )

    def check_prompt(self, prompt: Sequence[int], option: str) -> None:
        """That the configured template begins a conversation as this renderer does.

        Args:
            prompt: what the template of table `option` makes of the probe's message.

        Raises:
            RapoError: it begins otherwise.
        """
        asked = [{"role": "user", "content": _PROBE}]
        own = self._renderer.render_ids(asked, tools=self._tools or None, add_generation_prompt=True)
        if list(own) == list(prompt):
            return
        same = next((n for n, pair in enumerate(zip(own, prompt, strict=False)) if pair[0] != pair[1]), 0)
        texts = [self._tokenizer.decode(list(ids[same : same + 20])) for ids in (prompt, own)]
        raise RapoError(
            f'{_OPTION} = "{self._name}" writes other tokens than {option}.template, from token {same} on: '
            f"{texts[1]!r} instead of {texts[0]!r}; set renderer to the model's family, or renderer_options "
            "to what the template does"
        )


def open_rendering(
    config: RunConfig,
    options: RenderingOptions,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Rendering:
    """The rendering that the configuration names, checked against the prompts' template.

    Raises:
        RapoError: there is none of this name, it refuses its options or the tokenizer, or it begins chats
            otherwise than the template.
    """
    name = options.renderer
    if name == "auto":
        name = _of_model(config) if any(_is_chat(data) for _, data in _tables(config)) else "plain"
    try:
        renderer = _renderer(name, options.renderer_options, tokenizer, config)
    except RapoError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("environment.options.renderer_options", *first["loc"])))
        raise RapoError(f'{explain_value(first, key)} (renderer = "{name}")') from error
    except Exception as error:  # of the package, or a user's: the tokenizer lacks a token, say
        raise RapoError(
            f'{_OPTION} = "{name}" does not work with the tokenizer of {config.model.path}: '
            f"{type(error).__name__}: {error}; choose another"
        ) from error
    if tools and getattr(renderer, "supports_tools", True) is False:
        raise RapoError(
            f'{_OPTION} = "{name}" cannot tell how {config.model.path} writes calls, as its tokenizer has no '
            'token <tool_call>; set renderer_options = { tool_parser = "glm" } or another of the package '
            "renderers, or renderer to a class of your own, module:Class"
        )
    rendering = Rendering(renderer, tokenizer, tools, name)
    for table, data in _tables(config):
        _check_kind(name, table, data)
        if isinstance(data, Templated) and data.template == "chat":  # one's own may need a problem's columns
            asked = [{"role": "user", "content": _PROBE}]
            rendering.check_prompt(encode_chat(asked, tokenizer, data, table, config.run.date, tools), table)
    return rendering


def _tables(config: RunConfig) -> list[tuple[str, Data]]:
    """What the run trains on and is evaluated on, by the table that the user set."""
    held_out = zip(config.evaluation_tables, config.evaluation_data, strict=True)
    return [*zip(config.training_tables, config.training_sources, strict=True), *held_out]


def _is_chat(data: Data) -> bool:
    """Whether its prompts begin a chat; generated tasks and plain texts do not."""
    return isinstance(data, Templated) and data.template != "plain"


def _check_kind(name: str, table: str, data: Data) -> None:
    """Chats are continued by a family's renderer, plain texts by the plain one; one's own may do either."""
    if name == "plain" and _is_chat(data):
        raise RapoError(
            f'{_OPTION} = "plain" cannot continue the chats that {table}.template begins; set that to '
            f'"plain", or renderer to the model\'s family ({_names()})'
        )
    if name in (*_known(), TEMPLATE) and not _is_chat(data):
        raise RapoError(
            f'{_OPTION} = "{name}" continues chats, and {table} begins none; set it to "plain", or '
            f"{table}.template to a chat template"
        )


def _renderer(
    name: str, options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> Any:
    if ADDRESS.fullmatch(name):
        return load(name, config.run.code, _OPTION)(tokenizer, **options)
    if name == "plain":
        from megatron_rapo.environments.plain_renderer import Markers, PlainRenderer

        return PlainRenderer(tokenizer, Markers.model_validate(options))
    if name == TEMPLATE:
        from renderers.configs import DefaultRendererConfig

        from megatron_rapo.environments.template_renderer import TemplateRenderer

        return TemplateRenderer(
            tokenizer, DefaultRendererConfig.model_validate({**_switches(config), **options})
        )
    from renderers.base import create_renderer
    from renderers.configs import config_from_name

    if name not in _known():
        raise RapoError(
            f'{_OPTION} = "{name}" does not exist; choose one of {_names()}, template, plain, or module:Class'
        )
    kind = type(config_from_name(name))
    switches = _switches(config)
    own = {switch: value for switch, value in switches.items() if switch in kind.template_field_names()}
    return create_renderer(tokenizer, kind.model_validate({**own, **options}))


def _switches(config: RunConfig) -> Mapping[str, Any]:
    """Options of the prompts' template."""
    first = config.training_sources[0]
    return (first.template_options if isinstance(first, Templated) else None) or {}


def _of_model(config: RunConfig) -> str:
    """The family of a model that is in a folder of its name."""
    from renderers.base import MODEL_RENDERER_MAP

    folder = config.model.path.resolve().name
    for known, name in MODEL_RENDERER_MAP.items():
        if known.rpartition("/")[2] == folder:
            return name
    raise RapoError(
        f'{_OPTION} = "auto" does not know the model {folder}; set it to its family: {_names()}; to '
        '"template", which is exact where the model\'s own chat template writes turn behind turn, as '
        "Qwen2.5's does, and refuses others before the run; or to a class of your own, module:Class"
    )


def _known() -> list[str]:
    """The families, by name."""
    from renderers.configs import RendererConfig

    kinds = get_args(get_args(RendererConfig)[0])  # Annotated[Union[…], …]
    names = [kind.model_fields["name"].default for kind in kinds]
    return [name for name in names if name not in _NO_RENDERER]


def _names() -> str:
    return ", ".join(_known())
