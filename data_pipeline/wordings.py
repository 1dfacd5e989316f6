"""The wordings that a run asks the judge and the tagger with."""

from dataclasses import dataclass

from data_pipeline import judge
from data_pipeline.prompts import PromptTemplate
from data_pipeline.settings import ChainSettings
from data_pipeline.tagging import RestrictedTagging


@dataclass(frozen=True)
class Prompts:
    """The wordings in use."""

    judge: PromptTemplate
    tagging: RestrictedTagging

    @classmethod
    def load(cls, settings: ChainSettings) -> "Prompts":
        """Read the files.

        Raises:
            ConfigError: one cannot be used.
        """
        return cls(
            PromptTemplate.load("chains.prompts.judge", settings.prompts.judge, judge.PROMPT_FIELDS),
            RestrictedTagging.load(
                settings.tagging.mode, settings.prompts, settings.minimum_segments, settings.tagger.structured
            ),
        )
