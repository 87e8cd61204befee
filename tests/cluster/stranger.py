"""A client that knows no .proto file: it learns everything from server reflection. Run as `stranger.py ADDRESS IDS`."""

import json
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

channel = grpc.insecure_channel(sys.argv[1])
reflection = ProtoReflectionDescriptorDatabase(channel)
pool = DescriptorPool(reflection)
generate = pool.FindServiceByName("drover.v1.Inference").methods_by_name["Generate"]
request = GetMessageClass(generate.input_type)()
request.token_ids.ids.extend(json.loads(sys.argv[2]))
request.sampling.max_tokens = 12
request.sampling.temperature = 0
call = channel.unary_stream(
    f"/{generate.containing_service.full_name}/{generate.name}",
    request_serializer=lambda message: message.SerializeToString(),
    response_deserializer=GetMessageClass(generate.output_type).FromString,
)
token_ids = [token_id for response in call(request, timeout=60) for token_id in response.token_ids]
print(json.dumps({"services": list(reflection.get_services()), "token_ids": token_ids}))
