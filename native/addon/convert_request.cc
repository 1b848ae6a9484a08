// What submit and promptLogits take. JS thread only.
#include <utility>

#include "addon/convert.h"
#include "addon/tiles_wrap.h"

namespace turbomind::addon {
namespace {

std::vector<TokenId> to_tokens(const Field& array) {
  std::vector<TokenId> tokens(array.length());
  for (uint32_t i = 0; i < tokens.size(); ++i) tokens[i] = array.at(i).int32();
  return tokens;
}

SamplingParams to_sampling(const Field& f) {
  SamplingParams params;
  params.do_sample = f["doSample"].boolean();
  params.temperature = static_cast<float>(f["temperature"].number());
  params.top_k = f["topK"].int32();
  params.top_p = static_cast<float>(f["topP"].number());
  params.min_p = static_cast<float>(f["minP"].number());
  params.repetition_penalty = static_cast<float>(f["repetitionPenalty"].number());
  params.frequency_penalty = static_cast<float>(f["frequencyPenalty"].number());
  params.presence_penalty = static_cast<float>(f["presencePenalty"].number());
  const Field bias = f["logitBias"];
  for (uint32_t i = 0; i < bias.length(); ++i) {
    const Field pair = bias.at(i);
    if (pair.length() != 2) pair.fail("[token, bias]");
    params.logit_bias.emplace_back(pair.at(0).int32(), static_cast<float>(pair.at(1).number()));
  }
  params.seed = f["seed"].unsigned_bigint();
  params.num_logprobs = f["numLogprobs"].int32();
  const Field bad_words = f["badWords"];
  for (uint32_t i = 0; i < bad_words.length(); ++i) {
    params.bad_words.push_back(to_tokens(bad_words.at(i)));
  }
  return params;
}

ImageInput to_image(const Field& f) {
  ImageInput image;
  image.tiles = TilesWrap::unwrap(f["tiles"].value());
  if (image.tiles == nullptr) f["tiles"].fail("what makeTiles() resolved to");
  image.token_offset = f["tokenOffset"].int32();
  image.num_tokens = f["numTokens"].int32();
  return image;
}

OutputRange to_range(const Field& f) {
  const std::string name = f.string();
  if (name == "none") return OutputRange::none;
  if (name == "generation") return OutputRange::generation;
  if (name != "all") f.fail("'none', 'generation' or 'all'");
  return OutputRange::all;
}

OutputSpec to_outputs(const Field& f) {
  OutputSpec spec;
  spec.logits = to_range(f["logits"]);
  spec.hidden_states = to_range(f["hiddenStates"]);
  const std::string pooling = f["pooling"].string();
  if (pooling == "last") spec.pooling = Pooling::last;
  if (pooling == "mean") spec.pooling = Pooling::mean;
  if (pooling != "none" && spec.pooling == Pooling::none) {
    f["pooling"].fail("'none', 'last' or 'mean'");
  }
  spec.prompt_nll = f["promptNll"].boolean();
  return spec;
}

}  // namespace

Request to_request(const Field& f) {
  Request request;
  request.id = static_cast<RequestId>(f["id"].integer(0, kMaxSafeInteger));
  request.sampling = to_sampling(f["sampling"]);
  request.max_new_tokens = f["maxNewTokens"].int32();
  request.min_new_tokens = f["minNewTokens"].int32();
  if (const auto priority = f.optional("priority")) {
    request.priority = static_cast<int>(priority->integer(-100, 100));
  }
  if (const auto timeout = f.optional("queueTimeoutMs"))
    request.queue_timeout_ms = timeout->number();
  request.stop_token_ids = to_tokens(f["stopTokenIds"]);
  if (const auto guided = f.optional("guided")) request.guided = guided->boolean();
  if (const auto edits = f.optional("editsLogits")) request.edits_logits = edits->boolean();
  if (const auto outputs = f.optional("outputs")) request.outputs = to_outputs(*outputs);
  const Field images = f["images"];
  for (uint32_t i = 0; i < images.length(); ++i) request.images.push_back(to_image(images.at(i)));
  request.prompt_tokens = f["promptTokens"].int32s();
  return request;
}

}  // namespace turbomind::addon
