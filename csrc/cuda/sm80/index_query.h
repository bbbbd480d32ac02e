// index_query for every NVIDIA GPU from Ampere on. ops/index.cpp chooses among the candidates and has checked the
// parameters.
#pragma once

#include "ops/index.h"

namespace dsv4::sm80 {

Status index_query(const IndexQueryParams&, const Context&);

}  // namespace dsv4::sm80
