"""A builder's configuration: one YAML file that says everything about one data set, a section for each stage.

`load_config` reads the file and refuses what it does not know with the nearest valid name. Paths are relative to the
folder that the command runs in. No secret has a place here: keys are only ever read from the environment.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from huatuo_vision.recipe import Strict, first_sentence
from huatuo_vision.schema import UserError

# Licences under which a figure may be cropped, rescaled and passed on. ND forbids adaptations and NC commerce: whoever
# may use such figures names their licences in the configuration.
OPEN_LICENCES = ("CC0", "CC-BY", "CC-BY-SA")

# Labels that consumers of PubMedVision know; the released rows hold strays besides.
MODALITIES = (
    "Computed Tomography", "Magnetic Resonance Imaging", "X-Ray", "Ultrasound", "Nuclear Imaging", "Angiography",
    "Microscopy Images", "Endoscopy", "Fundus Photography", "Optical Coherence Tomography", "Dermoscopy",
    "Infrared Reflectance Imaging", "Digital Photography", "Others",
)  # fmt: skip
BODY_PARTS = (
    "Head", "Brain", "Eye", "Oral Cavity", "Neck", "Chest", "Breast", "Abdomen", "Gastrointestinal Tract",
    "Pelvic Cavity", "Spine", "Upper Limb", "Lower Limb", "Foot", "Skin", "Cell", "Others",
)  # fmt: skip


def refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{message}", {"message": message})


class Columns(Strict):
    """Which column (or key) of a pairs file holds what."""

    id: str = "id"
    image: str = Field("image", description="one file name or a list of them, relative to the source folder")
    caption: str = "caption"
    context: str | None = Field("context", description="further text about the image: a report, in-text mentions")
    article: str | None = Field("article", description="what the rows of one article, study or patient have in common")
    licence: str | None = "licence"
    source: str | None = "source"
    modality: str | None = Field("modality", description="one of the labels that answers are asked for")
    box: str | None = Field("box", description="x0, y0, x1, y1 in pixels of the stored picture; several in a row")


Kind = Literal["articles", "pairs", "cases", "volumes"]


class Source(Strict):
    """Reading one source into images and pairs."""

    kind: Kind = Field(
        "articles",
        description="articles: JATS with figure files; pairs: JSON Lines, CSV or Parquet of image and caption; cases: "
        "a folder with case.json for each; volumes: NIfTI files and folders of DICOM series, of which slices are taken",
    )
    licences: tuple[str, ...] = Field(
        OPEN_LICENCES, description="articles: what may be used, without version numbers; all others are dropped"
    )
    sub_articles: bool = Field(False, description="articles: figures of decision letters and author responses too")
    articles: str | None = Field(
        None,
        description="articles to read, one a line, or PMC's inventory (csv, csv.gz); None: all there are",
    )
    storage_options: dict[str, Any] = Field({}, description="of fsspec, for a source such as s3://; {anon: true}")
    columns: Columns = Columns()
    licence: str | None = Field(None, description="the licence of rows that name none; without it they drop")
    source: str | None = Field(None, description="what the rows' source is called, where they don't say")
    modality: str | None = Field(None, description="of rows that name none, where all of the source have the same")
    annotated: bool = Field(
        True, description="whether people described the pictures; else tags, boxes and dates are all there is"
    )
    window: tuple[float, PositiveFloat] | None = Field(
        None, description="DICOM, NIfTI and 16-bit pictures: centre and width, in place of the file's own window"
    )
    intercept: float = Field(
        0.0, description="added to 16-bit pictures' stored values before the window (-32768 for DeepLesion's)"
    )
    slices: PositiveInt = Field(10, description="volumes: so many of each, evenly spaced, or of those with a lesion")
    shard_size: PositiveInt = Field(200, description="articles, cases, volumes, or rows of a file, that one task reads")

    @model_validator(mode="after")
    def _check_source(self) -> Source:
        for key in self.storage_options:
            if re.search(r"key|secret|token|password", key, re.IGNORECASE):
                raise refuse(
                    f"storage_options.{key} looks like a secret; set it in the environment (AWS_..., or a file)"
                )
        if self.kind == "articles" and (self.licence or self.source or self.window):
            raise refuse("licence, source and window belong to kind: pairs; articles state their own")
        if self.kind != "articles" and self.articles is not None:
            raise refuse(f"articles belongs to kind: articles; give the folder of the {self.kind} as --source")
        if self.modality is not None and self.modality not in MODALITIES:
            raise refuse(f"modality is {self.modality!r}; expected one of {', '.join(MODALITIES)}")
        return self


class Part(Source):
    """One of several sources."""

    folder: str = Field(description="below --source; or a file in it")


class Ingest(Source):
    """What --source holds: one source, or a folder of several."""

    sources: dict[str, Part] = Field(
        {}, description="by the name that their rows keep; --source is then the folder that their folders stand in"
    )

    @model_validator(mode="after")
    def _check(self) -> Ingest:
        if self.sources and (alone := sorted(self.model_fields_set - {"sources", "storage_options"})):
            raise refuse(f"{alone[0]} stands beside sources; it belongs to one of them: sources.<name>.{alone[0]}")
        for name in self.sources:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._]*", name):
                raise refuse(f"sources.{name}: a name is of letters, digits, '.' and '_', since rows are called by it")
        return self

    def part(self, name: str | None) -> Source:
        """The settings of one of several sources; without a name, of the only one."""
        return self if name is None else self.sources[name]


class TextFilter(Strict):
    """At least `min_terms` distinct terms of a medical vocabulary in caption and context.

    Rows that nobody described are let through: tags are no text to judge by.
    """

    vocabulary: str | None = Field(
        None, description="a term a line, as python -m data.filters.vocabulary writes; None: the short list of our own"
    )
    min_terms: int = Field(5, ge=0)
    min_words: int = Field(0, ge=0, description="of the caption (SemiHVision's captions of PMC have 20 at least)")


class ImageEncoder(Strict):
    """What turns pictures into vectors. `clip` is the paper's way; `small` needs no weights, for tests and demos."""

    kind: Literal["clip", "small"] = "clip"
    id: str | None = Field(None, description="clip: the model's Hub id or folder")
    revision: str | None = None
    batch_size: PositiveInt = 32

    @model_validator(mode="after")
    def _check(self) -> ImageEncoder:
        if (self.kind == "clip") != (self.id is not None):
            raise refuse("encoder clip needs an id (a CLIP model on the Hub or a folder); encoder small has none")
        return self


class ImageFilter(Strict):
    """Resolution, then medical or not."""

    min_side: PositiveInt = Field(336, description="pixels of the shorter side")
    encoder: ImageEncoder = ImageEncoder(kind="small")
    classifier: str | None = Field(
        None, description="as python -m data.filters.classifier writes; None: no picture is dropped as not medical"
    )
    threshold: float | None = Field(None, ge=0, le=1, description="in place of the classifier's own")


class CaptionEncoder(Strict):
    """What turns captions into vectors. `hashing` compares words, not meaning; it needs no weights."""

    kind: Literal["sentence-transformers", "hashing"] = "sentence-transformers"
    id: str | None = None
    revision: str | None = None
    batch_size: PositiveInt = 64

    @model_validator(mode="after")
    def _check(self) -> CaptionEncoder:
        if (self.kind == "sentence-transformers") != (self.id is not None):
            raise refuse("encoder sentence-transformers needs an id (on the Hub or a folder); encoder hashing has none")
        return self


class Guard(Strict):
    """Rows that overlap the evaluation sets."""

    benchmarks: dict[str, str | None] = Field(
        {}, description="names as eval.py knows them, each with a local copy, or null for the Hub"
    )
    cases: str | None = Field(
        None,
        description="a file of held-out cases, one a line, as the rows' article calls them (<source>-<case>, where "
        "there are several sources)",
    )
    on_overlap: Literal["drop", "flag"] = "drop"
    question_words: PositiveInt = Field(8, description="a question overlaps by so many words in a row")


class Dedup(Strict):
    """Pictures that are the same by hash and on a second look, then nearness of captions."""

    max_hash_distance: int = Field(
        60, ge=0, le=128, description="of 256 bits; pictures no further apart are compared; 0: only exact copies drop"
    )
    min_likeness: float = Field(
        0.7, gt=0, le=1, description="correlation of the edges of two pictures, laid over each other, to be the same"
    )
    encoder: CaptionEncoder = CaptionEncoder(kind="hashing")
    min_cosine: float | None = Field(
        0.95, gt=0, le=1, description="captions at least this near are the same; null: captions are not compared"
    )
    guard: Guard = Guard()


class Balance(Strict):
    """How many rows of a source, and of a modality, go on. Of what is too many, people's descriptions stay first."""

    cap: PositiveInt | None = Field(None, description="rows of one source at most (Cambrian-1's t); None: all")
    modalities: dict[str, float] = Field(
        {}, description="modality -> its share of the rows that go on; what is not named drops; empty: as they come"
    )
    rows: PositiveInt | None = Field(
        None, description="in all; modalities with fewer fall short. None: as many as fill every share"
    )
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Balance:
        for name, share in self.modalities.items():
            if name not in MODALITIES:
                raise refuse(f"modalities.{name}: no such modality; expected some of {', '.join(MODALITIES)}")
            if not 0 < share <= 1:
                raise refuse(f"modalities.{name} is {share}; expected a share above 0 and at most 1")
        if self.modalities and abs(sum(self.modalities.values()) - 1) > 1e-3:
            raise refuse(f"modalities add up to {sum(self.modalities.values()):.4f}; shares add up to 1")
        if self.rows is not None and not self.modalities:
            raise refuse("rows goes with modalities; a source's own limit is cap")
        return self


class Guidelines(Strict):
    """Texts that say what findings mean and call for, in the layout of OpenGuidelines."""

    path: str = Field(description="JSON Lines (or .jsonl.gz) of id, source, title, clean_text")
    licence: str | None = Field(
        None, description="what the texts allow; rows written in their light are as restricted. None: restricted"
    )
    chunk_words: PositiveInt = Field(50, description="words of a chunk: a CLIP model reads 77 tokens and no more")


class TopK(Strict):
    guidelines: int = Field(2, ge=0)
    cases: int = Field(1, ge=0)


class Retrieve(Strict):
    """Evidence for the rows that nobody described: guideline chunks, and cases that people did describe."""

    encoder: ImageEncoder = Field(
        description="clip: both towers of one model; small: looks and words of our own, for tests and demonstrations"
    )
    guidelines: Guidelines | None = None
    top_k: TopK = TopK()
    image_weight: float = Field(0.5, ge=0, le=1, description="of the image's vector in the fused one; the rest: text")
    case_images: PositiveInt = Field(2, description="pictures of a case that are shown")

    @model_validator(mode="after")
    def _check(self) -> Retrieve:
        if self.guidelines is None and self.top_k.guidelines and "top_k" in self.model_fields_set:
            raise refuse("top_k.guidelines asks for guidelines, and guidelines.path names none; set it, or 0")
        return self


class Prices(Strict):
    """What an endpoint charges for a million tokens. None is built in: prices go stale."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached_input: float | None = Field(None, ge=0, description="None: as input")
    batch_discount: float = Field(0.5, ge=0, lt=1, description="what the batch route costs less")
    currency: str = "USD"


class Reformat(Strict):
    """Descriptions and questions by a multimodal language model (MLLM) behind an OpenAI-compatible endpoint."""

    method: Literal["native_caption", "llm_reformatted", "mllm_distill", "mllm_reformatted", "mllm_grounded"] = Field(
        "native_caption",
        description="the caption as it is; from text alone; from images alone; from both (the paper's); from both for "
        "what people described, and in the light of retrieved evidence for the rest",
    )
    model: str | None = Field(None, description="as the endpoint calls it; every method but native_caption needs one")
    base_url: str | None = Field(None, description="of the endpoint; None: OPENAI_BASE_URL")
    route: Literal["online", "batch"] = Field(
        "online", description="batch: answers come from python -m data.batch, and the stage asks nobody"
    )
    temperature: float | None = Field(None, ge=0, description="None: the endpoint's default")
    max_tokens: PositiveInt = 2048
    max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the endpoint calls it; some models know only the second"
    )
    extra_body: dict[str, Any] = Field({}, description="further parameters of a request: top_p, reasoning_effort, ...")
    image_side: PositiveInt = Field(1024, description="pixels; a longer side is made smaller for the request")
    jpeg_quality: int = Field(90, ge=1, le=100)
    max_reference_chars: PositiveInt = Field(12_000, description="in-text mentions beyond it are not sent")
    seed: int = Field(0, description="of the scenarios")
    concurrency: PositiveInt = Field(8, description="requests at once, in each task")
    max_retries: int = Field(8, ge=0, description="of what may pass: no connection, timeouts, 408, 409, 429, 5xx")
    timeout: float = Field(300.0, gt=0, description="seconds")
    max_failed_share: float = Field(0.05, ge=0, le=1, description="of a task's rows; above it the run stops")
    prices: Prices | None = None
    max_cost: float | None = Field(
        None, gt=0, description="in the prices' currency, over all runs into the same folder; the run stops below it"
    )

    @model_validator(mode="after")
    def _check(self) -> Reformat:
        if self.method != "native_caption" and self.model is None:
            raise refuse(f"method {self.method} asks a model; set model to the name that the endpoint knows it by")
        if self.max_cost is not None and self.prices is None:
            raise refuse("max_cost needs prices: {input: ..., output: ...}, for a million tokens each")
        if self.base_url is not None and "@" in self.base_url:
            raise refuse("base_url holds a user name or password; leave them out, keys come from OPENAI_API_KEY")
        return self

    def decides(self) -> dict[str, Any]:
        """What the answers depend on; the rest says where, how fast and for how much they are had."""
        elsewhere = {"base_url", "route", "concurrency", "max_retries", "timeout", "max_failed_share", "prices"}
        return self.model_dump(exclude=elsewhere | {"max_cost", "max_tokens_parameter"})


class Assemble(Strict):
    """The files of the finished data set."""

    shard_bytes: PositiveInt = Field(500 * 10**6, description="of images in one Parquet file, about")
    pubmedvision_files: bool = Field(
        True, description="PubMedVision's own layout beside Parquet: JSON and zip archives; takes as much disk again"
    )


class Executor(Strict):
    """How tasks are run. Changes nothing in the result."""

    workers: PositiveInt | None = Field(None, description="local: processes at once; None: one a core")
    slurm: dict[str, Any] = Field({}, description="arguments of datatrove's SlurmPipelineExecutor: partition, ...")
    ray: dict[str, Any] = Field({}, description="arguments of datatrove's RayPipelineExecutor")


class BuildConfig(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    ingest: Ingest = Ingest()
    text_filter: TextFilter = TextFilter()
    image_filter: ImageFilter = ImageFilter()
    dedup: Dedup = Dedup()
    balance: Balance = Balance()
    retrieve: Retrieve | None = Field(None, description="None: no row is written in the light of others")
    reformat: Reformat = Reformat()
    assemble: Assemble = Assemble()
    executor: Executor = Executor()
    notice: str | None = Field(None, description="stands at the top of the data card, where something is not real")

    @model_validator(mode="after")
    def _check(self) -> BuildConfig:
        if self.retrieve is not None and self.reformat.method != "mllm_grounded":
            raise refuse(
                f"retrieve finds evidence that reformat.method {self.reformat.method} never reads; set it to "
                "mllm_grounded, or remove retrieve"
            )
        return self


def load_config(path: Path) -> BuildConfig:
    """Raises UserError, in one sentence, for anything the file gets wrong."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"configuration {path} does not exist; data/pubmedvision.yaml is the shipped one") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"configuration {path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"configuration {path} is empty or not a mapping; expected keys such as name, ingest, dedup")
    try:
        return BuildConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"configuration {path}: {first_sentence(error)}") from None
